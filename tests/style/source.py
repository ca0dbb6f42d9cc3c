#!/usr/bin/env python3
"""Checks the form of source files; CTest runs it as `source`.  Usage: source.py SOURCE_DIR

- core, plugins, sdk, tests: a line has at most 120 columns;
- core, plugins, sdk: no conditional expression stands inside another."""
import os
import re
import sys

COLUMNS_MOST = 120
ENDINGS = (".c", ".h", ".cu", ".cuh", ".cpp", ".py", ".cmake", "CMakeLists.txt")


def blank(match):
    return re.sub(r"[^\n]", " ", match.group(0))


def code_of(text):
    """The text without comments, strings and characters; as long, line by line."""
    text = re.sub(r"/\*.*?\*/|//[^\n]*", blank, text, flags=re.S)
    return re.sub(r'"(?:\\.|[^"\\\n])*"|\'(?:\\.|[^\'\\\n])+\'', blank, text)


def is_nested(statement):
    depth, open_at = 0, []  # the depth of parentheses at which each conditional stands that has not ended
    for c in statement:
        if c in "([{":
            depth += 1
        elif c in ")]}":
            depth -= 1
            while open_at and open_at[-1] > depth:
                open_at.pop()
        elif c == ",":
            while open_at and open_at[-1] >= depth:
                open_at.pop()
        elif c == "?":
            if open_at:
                return True
            open_at.append(depth)
    return False


def long_lines(name, text):
    return [f"{name}:{i}: {len(line)} columns, and {COLUMNS_MOST} are allowed"
            for i, line in enumerate(text.split("\n"), 1) if len(line) > COLUMNS_MOST]


def nested(name, text):
    code, faults = code_of(text), []
    for m in re.finditer(r"[^;]*;", code):
        for part in re.split(r"\{|\}(?!\s*,)", m.group(0)):
            if part.count("?") > 1 and is_nested(part):
                line = code.count("\n", 0, m.start() + len(m.group(0)) - len(m.group(0).lstrip())) + 1
                faults.append(f"{name}:{line}: a conditional expression inside another")
    return faults


def main():
    faults = []
    for top in "core", "plugins", "sdk", "tests":
        for folder, _, names in os.walk(os.path.join(sys.argv[1], top)):
            for name in sorted(names):
                if not name.endswith(ENDINGS):
                    continue
                path = os.path.join(folder, name)
                with open(path, encoding="utf-8") as f:
                    text = f.read()
                shown = os.path.relpath(path, sys.argv[1])
                faults += long_lines(shown, text)
                if top != "tests" and not name.endswith((".py", ".cmake", ".txt")):
                    faults += nested(shown, text)
    print("\n".join(faults) if faults else "every line has its room, and no conditional expression is inside another")
    return 1 if faults else 0


sys.exit(main())
