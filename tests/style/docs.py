#!/usr/bin/env python3
"""Checks the pages for people; CTest runs it as `docs`.  Usage: docs.py SOURCE_DIR PHALANX_COMMAND

- docs/configuration.md has what `phalanx help --markdown` prints, section by section, and no other section but those of
  plugins that this build lacks (cuda, nccl);
- README.md has fewer than 150 lines;
- every relative link of README.md, CONTRIBUTING.md and docs/ leads to a file, and its #heading is there;
- every path in backticks that begins with a folder of the tree exists."""
import os
import re
import subprocess
import sys

MAY_BE_MISSING = {"## [cuda]", "## [nccl]"}
README_MOST = 149


def read(path):
    with open(path, encoding="utf-8") as f:
        return f.read()


def sections(text):
    parts = re.split(r"^(?=## )", text, flags=re.M)[1:]
    return {p.split("\n", 1)[0]: p.strip() for p in parts}


def configuration_faults(source, command):
    printed = subprocess.run([command, "help", "--markdown"], capture_output=True, text=True, check=True).stdout
    page, now = sections(read(os.path.join(source, "docs/configuration.md"))), sections(printed)
    faults = [f"docs/configuration.md: {name} is not what `phalanx help --markdown` prints"
              for name, text in now.items() if page.get(name) != text]
    faults += [f"docs/configuration.md: there is no {name} in this build"
               for name in page if name not in now and name not in MAY_BE_MISSING]
    return faults


def anchors(text):
    heads = re.findall(r"^#+ (.*)$", text, flags=re.M)
    return {re.sub(r"[^a-z0-9 _-]", "", h.lower()).replace(" ", "-") for h in heads}


def page_faults(source, name):
    text, faults = read(os.path.join(source, name)), []
    here = os.path.dirname(os.path.join(source, name))
    for link in re.findall(r"\]\(([^)\s]+)\)", text):
        if "://" in link:
            continue
        path, _, anchor = link.partition("#")
        target = os.path.join(here, path) if path else os.path.join(source, name)
        if not os.path.exists(target):
            faults.append(f"{name}: the link {link} leads to no file")
        elif anchor and anchor not in anchors(read(target)):
            faults.append(f"{name}: the link {link} leads to no heading")
    for path in re.findall(r"`((?:core|plugins|sdk|tests|docs)/[A-Za-z0-9_./-]*[A-Za-z0-9_])`", text):
        if not os.path.exists(os.path.join(source, path)):
            faults.append(f"{name}: {path} does not exist")
    return faults


def main():
    source, command = sys.argv[1:3]
    faults = configuration_faults(source, command)
    lines = read(os.path.join(source, "README.md")).count("\n")
    if lines > README_MOST:
        faults.append(f"README.md has {lines} lines, and {README_MOST} are allowed")
    pages = ["README.md", "CONTRIBUTING.md"] + ["docs/" + n for n in sorted(os.listdir(os.path.join(source, "docs")))]
    for name in pages:
        faults += page_faults(source, name)
    print("\n".join(faults) if faults else f"{len(pages)} pages are true")
    return 1 if faults else 0


sys.exit(main())
