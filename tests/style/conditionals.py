#!/usr/bin/env python3
"""Fails on a conditional expression inside another one; CTest runs it as `conditionals`.  Usage: conditionals.py SOURCE"""
import os
import re
import sys


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


def main():
    faults = 0
    for top in "core", "plugins", "sdk":
        for folder, _, names in os.walk(os.path.join(sys.argv[1], top)):
            for name in sorted(names):
                if not name.endswith((".c", ".h", ".cu")):
                    continue
                path = os.path.join(folder, name)
                with open(path, encoding="utf-8") as f:
                    code = code_of(f.read())
                for m in re.finditer(r"[^;]*;", code):
                    for part in re.split(r"\{|\}(?!\s*,)", m.group(0)):
                        if part.count("?") > 1 and is_nested(part):
                            line = code.count("\n", 0, m.start() + len(m.group(0)) - len(m.group(0).lstrip())) + 1
                            print(f"{os.path.relpath(path, sys.argv[1])}:{line}: a conditional expression inside another")
                            faults += 1
    if not faults:
        print("no conditional expression stands inside another")
    return 1 if faults else 0


sys.exit(main())
