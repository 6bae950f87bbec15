"""Command lines out of frozen dataclasses: a script's config is its flags. Shared by the scripts."""
import argparse
import ctypes
import dataclasses
import json
import os
import re
import sys

MISSING = object()  # argparse takes its own SUPPRESS for "not given", and would leave the default in place


def option(default, help):
    """A dataclass field with its line for --help."""
    return dataclasses.field(default=default, metadata={"help": help})


def parse(Config, argv, description=None):
    """`Config` filled from `argv`: field `max_new_tokens: int = 256` is `--max-new-tokens N`, a bool also `--no-...`.

    The annotation says how a value is read (int, float, str, bool; `str | None` reads as str). Raises one ValueError
    that lists every problem: unknown flags, bad values, and whatever `Config.problems()` finds wrong between them.
    """
    parser = argparse.ArgumentParser(description=description, allow_abbrev=False, exit_on_error=False,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    fields = dataclasses.fields(Config)
    for f in fields:
        name, help = "--" + f.name.replace("_", "-"), f.metadata.get("help", "") + f" (default: {f.default})"
        if f.type is bool:
            parser.add_argument(name, action=argparse.BooleanOptionalAction, default=f.default, help=help)
        else:  # nargs="?" so that a missing value is our problem to report, together with the others
            parser.add_argument(name, nargs="?", default=f.default, const=MISSING,
                                metavar=f.name.upper().split("_")[-1], help=help.replace("%", "%%"))
    try:
        given, unknown = parser.parse_known_args(argv)
    except argparse.ArgumentError as e:
        raise ValueError(str(e)) from None
    problems = [f"unknown argument {u!r} (see --help)" for u in unknown]
    values = vars(given)
    for f in fields:
        kind = next((k for k in (bool, int, float, str) if f.type in (k, k | None)), None)
        assert kind, f"{Config.__name__}.{f.name}: {f.type} is no type for a flag"
        name, value = "--" + f.name.replace("_", "-"), values[f.name]
        if value is MISSING:
            problems.append(f"{name} needs a value")
            values[f.name] = f.default  # so that the other settings are looked at all the same
        elif isinstance(value, str):
            try:
                values[f.name] = kind(value)
            except ValueError:
                problems.append(f"{name} is {value!r}, wanted {'a whole number' if kind is int else 'a number'}")
                values[f.name] = f.default
    problems += Config(**values).problems()
    if problems:
        raise ValueError("; ".join(problems))
    return Config(**values)


def read_jsonl(path):
    """(line number, object) of each line of a JSON Lines file; blank lines are skipped. ValueError names the line."""
    records = [(number, parse_line(line, f"{path}:{number}")) for number, line in read_lines(path)]
    if not records:
        raise ValueError(f"{path} is empty: wanted one JSON object a line")
    return records


def read_lines(path):
    """Yields (line number, line) of each line that is not blank, one in memory at a time. Bytes that are no UTF-8 stand
    there as lone surrogates, so that one bad line does not end the reading: parse_line names them."""
    try:
        with open(path, encoding="utf-8", errors="surrogateescape") as file:
            for number, line in enumerate(file, 1):
                if line.strip():
                    yield number, line
    except OSError as e:
        raise ValueError(f"cannot read {path}: {e}") from None


def parse_line(line, where):
    """The object of one line of `read_lines`; ValueError with `where`."""
    try:
        record = json.loads(line.encode("utf-8", "surrogateescape").decode("utf-8"))
    except json.JSONDecodeError as e:
        raise ValueError(f"{where}: no JSON: {e}") from None
    except UnicodeDecodeError as e:
        raise ValueError(f"{where}: cannot read it: {e}") from None
    except RecursionError:
        raise ValueError(f"{where}: no JSON: nested too deep") from None
    if not isinstance(record, dict):
        raise ValueError(f"{where}: wanted a JSON object, found {type(record).__name__}")
    check_text(record, where)
    return record


def say(text):
    """Progress and statistics, on stderr: stdout is for results. Of several processes the first one speaks."""
    if first_process():
        print(text, file=sys.stderr, flush=True)


def first_process():
    return os.environ.get("RANK", "0") == "0"  # torchrun numbers the processes of a run


def check_text(value, where):
    try:
        json.dumps(value, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        raise ValueError(f"{where}: half a character (a lone surrogate), which UTF-8 cannot write") from None


def keep_memory():
    """Has the C library keep what is freed, up to 2 GB, for the next tensors. Linux's glibc would give the free end of the
    heap back and ask for it anew, page by page: a tenth of a training step on a CPU. Above 32 MB a tensor it still does."""
    M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # malloc.h; 32 MB is the most that the latter takes
    library = ctypes.CDLL(None) if sys.platform == "linux" else None
    if hasattr(library, "mallopt"):
        library.mallopt(M_TRIM_THRESHOLD, 2**31 - 1)
        library.mallopt(M_MMAP_THRESHOLD, 2**25)


def run(main):
    """Runs a script's main(): what a user can cause ends in one line and exit code 2, Ctrl-C in 130."""
    keep_memory()
    try:
        main()
    except BrokenPipeError:  # the reader of our output has gone (`| head`): nothing to tell anybody
        sys.stderr.close()
        sys.exit(141)
    except (ValueError, OSError, MemoryError, RuntimeError) as e:
        if isinstance(e, RuntimeError) and not re.search("out of memory|allocate memory", str(e)):
            raise  # a bug, not too small a machine
        print(f"error: {' '.join(str(e).split())}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("\ninterrupted", file=sys.stderr)
        sys.exit(130)
