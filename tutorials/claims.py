"""One ledger of all claims: `python tutorials/claims.py` writes figures/claims.md from the outputs
of the executed notebooks."""

import html
import json
import re
from pathlib import Path

HERE = Path(__file__).resolve().parent
LEDGER = HERE.parent / "figures" / "claims.md"
HEAD = """# What papers claim, and what came out here

Every claim of every notebook, with the criterion that was fixed before measuring and the number
that was measured, at the scale of the committed outputs. Made by `python tutorials/claims.py`.
"""
COLUMNS = ["claim", "source", "criterion", "measured", "holds?"]


def rows(path):
    """The claims of one notebook, as lists of five texts, empty where nothing is said."""
    found = []
    for cell in json.loads(path.read_text(encoding="utf-8"))["cells"]:
        for output in cell.get("outputs", []):
            table = "".join(output.get("data", {}).get("text/html", ""))
            if "<th style=\"text-align:left\">claim</th>" in table:
                found += [[_plain(entry) for entry in re.findall(r"<td.*?>(.*?)</td>", line)]
                          for line in table.splitlines() if "<td" in line]
            text = "".join(output.get("text", ""))
            if text.startswith("claim of the paper"):
                for line in text.splitlines()[1:]:
                    claim, criterion, holds = (part.strip() for part in line.split(" | "))
                    found.append([claim, "", criterion, "", holds])
    return found


def ledger():
    """The text of figures/claims.md."""
    parts = [HEAD]
    for path in sorted(HERE.glob("*.ipynb")):
        parts.append(f"\n## [{path.stem}](../tutorials/{path.name})\n")
        parts += [_line(COLUMNS), _line(["---"] * len(COLUMNS))]
        parts += [_line(row) for row in rows(path)]
    return "\n".join(parts) + "\n"


def write():
    LEDGER.write_text(ledger(), encoding="utf-8", newline="\n")


def _plain(entry):
    """The text of an HTML cell, with its links into the tutorials' folder."""
    linked = re.sub(r'<a href="(.*?)">(.*?)</a>', r"[\2](../tutorials/\1)", entry)
    return html.unescape(linked)


def _line(row):
    return "| " + " | ".join(text.replace("|", "\\|") for text in row) + " |"


if __name__ == "__main__":
    write()
