"""What the model is told about its flag in modes reflect and backtrack: the text file reflect.txt, read and checked.

The file is the operator's: `<|red_flag|>` in it becomes the real flag, which nothing that a user writes ever does.
"""
from dataclasses import dataclass
from pathlib import Path

from tokenizer import FLAG_TEXT

DEMOS = str(Path(__file__).resolve().parent / "reflect.txt")
ONCE, TURNS = ("introduction", "opening", "false alarm"), ("user", "assistant")


@dataclass(frozen=True)
class Demos:
    text: str         # the introduction and the dialogues, for the end of the system message
    opening: str      # forced behind every flag
    false_alarm: str  # words that say, behind the opening, that the flag was raised falsely; lower case


def read_demos(path):
    """Demos of a file of sections, each headed by its name in brackets: [introduction], [opening] and [false alarm]
    once, then dialogues of [user] and [assistant] in turn. Lines before the first section are comments.

    In each assistant's answer the flag is spelled once, and the opening stands behind it; some answers hold the false
    alarm's words and some do not. ValueError names file and line.
    """
    once, turns = {}, []
    for line, name, text in sections(path):
        wanted = TURNS[len(turns) % 2]
        if name in ONCE and name not in once:
            once[name] = text
        elif name == wanted:
            turns.append((line, name, text))
        else:
            rest = [f"[{n}]" for n in (*ONCE, wanted) if n not in once]
            raise ValueError(f"{path}:{line}: [{name}] does not belong here, wanted {' or '.join(rest)}")
    missing = [f"[{name}]" for name in ONCE if name not in once] + ["[assistant]"] * (len(turns) % 2)
    if missing or not turns:
        raise ValueError(f"{path}: at its end {', '.join(missing or ['[user] and [assistant]'])} is missing")
    opening, alarm = once["opening"], once["false alarm"].lower()
    if FLAG_TEXT in opening or alarm in opening.lower():
        raise ValueError(f"{path}: [opening] must hold neither {FLAG_TEXT} nor the words of [false alarm]")
    endings = {check_answer(f"{path}:{line}", text, opening, alarm) for line, _, text in turns[1::2]}
    if len(endings) < 2:
        raise ValueError(f"{path}: wanted answers of both kinds, with the words of [false alarm] ({alarm!r}) behind "
                         "the opening and without")
    dialogues = "".join(f"\n\nUser: {q}\nAssistant: {a}" for (*_, q), (*_, a) in zip(turns[::2], turns[1::2]))
    return Demos("\n\n" + once["introduction"] + dialogues, opening, alarm)


def sections(path):
    """(line number of the heading, name, text) of each section."""
    try:
        lines = Path(path).read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as e:
        raise ValueError(f"cannot read the demonstrations: {e}") from None
    names = ONCE + TURNS
    starts = [n for n, line in enumerate(lines) if line.startswith("[") and line.rstrip().endswith("]")]
    for n, after in zip(starts, starts[1:] + [len(lines)]):
        name, text = lines[n].strip()[1:-1], "\n".join(lines[n + 1:after]).strip()
        if name not in names:
            raise ValueError(f"{path}:{n + 1}: section [{name}], wanted one of {', '.join(f'[{x}]' for x in names)}")
        if not text:
            raise ValueError(f"{path}:{n + 1}: section [{name}] is empty, wanted text on the lines below it")
        yield n + 1, name, text


def check_answer(where, text, opening, alarm):
    """Whether the answer calls its flag a false alarm. ValueError where it is not one flag and then the opening."""
    if text.count(FLAG_TEXT) != 1:
        raise ValueError(f"{where}: the answer spells {FLAG_TEXT} {text.count(FLAG_TEXT)} times, wanted once")
    behind = text.split(FLAG_TEXT)[1].lstrip()
    if not behind.startswith(opening):
        raise ValueError(f"{where}: behind {FLAG_TEXT} comes {behind[:40]!r}, wanted that of [opening], {opening!r}")
    return alarm in behind.lower()
