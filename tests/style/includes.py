#!/usr/bin/env python3
"""Checks that includes go one way; CTest runs it as `includes`.  Usage: includes.py SOURCE_DIR

A module is a .c file and the .h file of the same name.
  core     a room includes itself and the rooms before it in ROOMS, by "room/file.h"
  plugins  a plugin includes its own folder, and <phalanx/...>
  sdk      includes nothing of core or plugins
Anywhere: no circle of modules.  Prints each fault and ends with 1 where there is one.
--count prints the lines of each room, and the arrows, instead."""
import os
import re
import sys

ROOMS = ["base", "config", "plugin", "engine", "job", "checkpoint", "command"]
ENGINE_MOST = 4500  # lines that are not blank
INCLUDE = re.compile(r'^\s*#\s*include\s+"([^"]+)"', re.M)


def read_modules(root):
    """Module -> the set of modules that it includes; a name that is no file of the tree stands as written."""
    files = {}
    for folder, _, names in os.walk(root):
        for name in names:
            if name.endswith((".c", ".h", ".cu")):
                path = os.path.join(folder, name)
                with open(path, encoding="utf-8") as f:
                    files[os.path.relpath(path, root)] = f.read()
    modules = {}
    for path, text in files.items():
        module = os.path.splitext(path)[0]
        for name in INCLUDE.findall(text):
            beside = os.path.normpath(os.path.join(os.path.dirname(path), name))
            target = beside if beside in files else name
            if os.path.splitext(target)[0] != module:
                modules.setdefault(module, set()).add(os.path.splitext(target)[0])
        modules.setdefault(module, set())
    lines = {}
    for path, text in files.items():
        room = path.split(os.sep)[0]
        lines[room] = lines.get(room, 0) + sum(1 for line in text.split("\n") if line.strip())
    return modules, lines


def circles(modules):
    """The strongly connected components of more than one module (Tarjan 1972)."""
    index, low, stack, found = {}, {}, [], []

    def visit(module):
        index[module] = low[module] = len(index)
        stack.append(module)
        for other in sorted(modules[module]):
            if other not in modules:
                continue
            if other not in index:
                visit(other)
                low[module] = min(low[module], low[other])
            elif other in stack:
                low[module] = min(low[module], index[other])
        if low[module] == index[module]:
            at = stack.index(module)
            if len(stack) - at > 1:
                found.append(sorted(stack[at:]))
            del stack[at:]

    sys.setrecursionlimit(10000)
    for module in sorted(modules):
        if module not in index:
            visit(module)
    return found


def core_faults(modules, lines):
    faults = []
    for module, others in sorted(modules.items()):
        room = module.split(os.sep)[0]
        if module != "main" and room not in ROOMS:
            faults.append(f"core/{module} is in no room: expected one of {', '.join(ROOMS)}")
            continue
        for other in sorted(others):
            theirs = other.split(os.sep)[0]
            if other not in modules:
                faults.append(f'core/{module} includes "{other}.h", which is no file of core: write "room/file.h"')
            elif module != "main" and ROOMS.index(theirs) > ROOMS.index(room):
                faults.append(f"core/{module} includes {other}: the room {room} comes before {theirs}")
    if lines.get("engine", 0) > ENGINE_MOST:
        faults.append(f"core/engine has {lines['engine']} lines, and {ENGINE_MOST} are allowed")
    return faults


def plugin_faults(name, modules):
    return [f'plugins/{name}/{module} includes "{other}.h", which is not in its folder'
            for module, others in sorted(modules.items()) for other in sorted(others) if other not in modules]


def main():
    source = sys.argv[-1]
    core, lines = read_modules(os.path.join(source, "core"))
    if "--count" in sys.argv:
        for room in ROOMS:
            print(f"{room:12} {lines.get(room, 0):6} lines")
        print(f"{sum(len(o) for o in core.values())} arrows between {len(core)} modules")
        return 0
    faults = core_faults(core, lines)
    faults += ["core: a circle of " + ", ".join(c) for c in circles(core)]
    plugins = os.path.join(source, "plugins")
    for name in sorted(os.listdir(plugins)):
        if os.path.isdir(os.path.join(plugins, name)):
            modules, _ = read_modules(os.path.join(plugins, name))
            faults += plugin_faults(name, modules)
            faults += [f"plugins/{name}: a circle of " + ", ".join(c) for c in circles(modules)]
    for folder in "include", "kit":
        modules, _ = read_modules(os.path.join(source, "sdk", folder))
        faults += [f"sdk/{folder}: a circle of " + ", ".join(c) for c in circles(modules)]
    print("\n".join(faults) if faults else "every include goes one way")
    return 1 if faults else 0


sys.exit(main())
