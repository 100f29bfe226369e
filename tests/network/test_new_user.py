"""A new user on two machines: the commands of docs/machines.md, executed as they are written there, say what it says.

The two share no home folder and nothing below it. ``pip install`` is taken as done: both find the same environment.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from network.hosts import Network
from network.lab import log
from processes import Program

PAGE = Path(__file__).parents[2] / "docs" / "machines.md"
SECTION = "From nothing to the first token"
MOST_COMMANDS = 6

_PROMPT = re.compile(r"(device|caller)\$ (.*)")
# What differs from one run to the next: keys, their fingerprints, home folders, who the user is, speeds and threads.
_CHANGING = re.compile(
    r"(?<=['#])[^\s'#]{40}(?=['\s]|$)|SHA256:[\w+/]{43}|/home/\w+|\b\w+@[\w.-]+|\b[\d.]+ tokens/s|\b\d+ threads?\b"
)


@dataclass
class Command:
    """One command of the page, and the lines that the page shows after it; ``...`` stands for any lines, and at the end of a line for its rest."""

    machine: str
    text: str
    shown: list[str] = field(default_factory=list)


def commands_of(page: str) -> list[Command]:
    """Return the commands of the section."""
    section = page.split(f"## {SECTION}\n")[1].split("\n## ", maxsplit=1)[0]
    found: list[Command] = []
    for block in re.findall(r"```console\n(.*?)```", section, re.DOTALL):
        for line in block.replace("\\\n", "").splitlines():
            prompt = _PROMPT.fullmatch(line)
            if prompt is not None:
                found.append(Command(prompt[1], prompt[2]))
            else:
                found[-1].shown.append(line)
    return found


class Transcript:
    """What stands on the page for what was printed here."""

    def __init__(self) -> None:
        self._here: dict[str, str] = {}

    def command(self, text: str) -> str:
        """Return a command of the page with what was printed here."""
        return _CHANGING.sub(lambda match: self._here.get(match[0], match[0]), text)

    def compare(self, shown: list[str], printed: list[str]) -> None:
        """Compare lines of the page with those that were printed, and learn what stands for what."""
        pattern, changing = "", []
        for line in shown:
            if line.strip() == "...":
                pattern += r"(?:.*\n)*?"
                continue
            position = 0
            for match in _CHANGING.finditer(line):
                pattern += re.escape(line[position : match.start()])
                known = self._here.get(match[0])
                same_words = re.sub(r"\S+", r"[^\\s']+", match[0])
                pattern += f"({same_words if known is None else re.escape(known)})"
                changing.append(match[0])
                position = match.end()
            rest = line[position:].rstrip()
            is_open = rest.endswith(" ...")
            pattern += re.escape(rest.removesuffix("...") if is_open else rest) + (r".*\n" if is_open else r"\n")
        text = "".join(f"{line.rstrip()}\n" for line in printed)
        found = re.fullmatch(pattern, text)
        assert found is not None, "the page says\n" + "\n".join(shown) + "\nand this was printed:\n" + text
        self._here |= dict(zip(changing, found.groups(), strict=True))


@pytest.mark.lengthy
def test_the_commands_of_the_page_lead_to_a_first_token(network: Network) -> None:
    commands = commands_of(PAGE.read_text())
    assert 0 < len(commands) <= MOST_COMMANDS
    hosts = {"device": network.add("device", address="10.0.0.5"), "caller": network.add("caller")}
    hosts["device"].hidden.append(hosts["caller"].folder)
    hosts["caller"].hidden.append(hosts["device"].folder)
    transcript = Transcript()
    for command in commands:
        if command.text.startswith("pip install "):
            continue
        text = transcript.command(command.text)
        program = hosts[command.machine].start("sh", "-c", text)
        printed = lines_of(program, number=len(command.shown) if "lingualinked worker" in text else None)
        log.info("%s$ %s\n%s", command.machine, text, "\n".join(printed))
        transcript.compare(command.shown, printed)


def lines_of(program: Program, number: int | None) -> list[str]:
    """Return so many lines that a program prints; ``None``: all, after it has ended well."""
    printed: list[str] = []
    if number is not None:
        while len(printed) < number:
            printed.append(program.read_until("", 120))
        return printed
    output, _ = program.process.communicate(timeout=200)
    assert program.process.returncode == 0, program.errors()
    return output.decode().splitlines()


def test_a_page_is_compared_with_what_was_printed() -> None:
    transcript = Transcript()
    page = [
        "Made the key",
        "  authorize 'rq:rM>}U?@Lns47E1%kR.o@n%FcmmsL/@{H8]yf7' ada@laptop",
        "...",
        "Once upon ...",
        "9 threads",
    ]
    printed = ["Made the key", "  authorize 'Yne@$w-vo<fVvi]a<NY6T1ed:M$fCG*[IaLV{hID' eve@desk", "1.2 s", "3 s"]
    printed += ["Once upon a time", "2 threads"]
    transcript.compare(page, printed)
    said = transcript.command("authorize 'rq:rM>}U?@Lns47E1%kR.o@n%FcmmsL/@{H8]yf7' --name ada@laptop")
    assert said == "authorize 'Yne@$w-vo<fVvi]a<NY6T1ed:M$fCG*[IaLV{hID' --name eve@desk"
