"""What an evaluation keeps on disk, so that an interrupted one goes on, and what it says meanwhile."""
import hashlib
import json
import os
import time

from cli import say


def digest(data):
    return hashlib.sha256(data).hexdigest()


class Progress:
    """Says what is done, and how long the rest will take by each part's rough cost."""

    def __init__(self, parts):
        """parts: name -> cost, in whatever unit."""
        self.left, self.spent, self.began = dict(parts), 0.0, time.perf_counter()

    def skip(self, name):
        self.left.pop(name)

    def done(self, name, what):
        self.spent += self.left.pop(name)
        seconds = (time.perf_counter() - self.began) / self.spent * sum(self.left.values())
        say(f"{what}, {seconds / 60:.1f} min left")


class Run:
    """What is on disk of a run: results.jsonl, and figures.json for what is no answer. Made for going on later."""

    def __init__(self, out, identity, fresh):
        self.out, self.results, self.figures = out, {}, {"run": identity, "batches": []}
        self.began, self.minutes_before = time.perf_counter(), 0.0
        out.mkdir(parents=True, exist_ok=True)
        if not fresh and (out / "figures.json").exists():
            self.load(identity)
        self.rewrite()
        self.save("run", identity)

    def load(self, identity):
        try:
            self.figures = json.loads((self.out / "figures.json").read_text(encoding="utf-8"))
            before, self.minutes_before = dict(self.figures["run"]), self.figures["minutes"]
            lines = (self.out / "results.jsonl").read_text(encoding="utf-8").split("\n")
        except (OSError, ValueError, KeyError, TypeError) as e:
            raise ValueError(f"cannot go on with the run in {self.out} ({type(e).__name__}): --fresh begins "
                             "anew") from None
        differ = [k for k, v in identity.items() if before.get(k) != v]
        if differ:
            raise ValueError(f"{self.out} holds the results of another run ({', '.join(differ)} differ): --fresh begins "
                             "anew, --out names another folder")
        for line in lines:
            try:
                r = json.loads(line)
                self.results[self.key(r)] = r
            except ValueError:
                continue  # cut off in mid-line, or the empty one behind the last

    key = staticmethod(lambda r: (r["set"], r["attack"], r["seed"], r["i"]))

    def add(self, results):
        self.results |= {self.key(r): r for r in results}
        with open(self.out / "results.jsonl", "a", encoding="utf-8") as f:
            f.write("".join(json.dumps(r, ensure_ascii=False) + "\n" for r in results))

    def rewrite(self):
        with open(self.out / "results.jsonl.tmp", "w", encoding="utf-8") as f:
            f.writelines(json.dumps(r, ensure_ascii=False) + "\n" for r in self.results.values())
        os.replace(self.out / "results.jsonl.tmp", self.out / "results.jsonl")

    def save(self, name, value):
        self.figures |= {name: value, "minutes": self.minutes_before + (time.perf_counter() - self.began) / 60}
        (self.out / "figures.json.tmp").write_text(json.dumps(self.figures, indent=1), encoding="utf-8")
        os.replace(self.out / "figures.json.tmp", self.out / "figures.json")

    def once(self, name, inputs, progress, make):
        """Makes figure `name` unless it is there, made of the same inputs (whatever JSON can hold)."""
        inputs = digest(json.dumps(inputs).encode())
        if self.figures.get(f"{name} of") == inputs:
            return progress.skip(name)
        self.save(name, make())
        self.save(f"{name} of", inputs)
        progress.done(name, name)
