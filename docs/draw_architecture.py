"""Draws docs/architecture.svg, and the table beside it, from the imports in the code.

Example: python docs/draw_architecture.py
         python docs/draw_architecture.py --check    # exit code 1 where they are no longer so

A box is a folder, or a module of a package's root that imports folders; root modules that import
none are one box, the ground. What only starts a command, ``__main__``, is not drawn. An arrow is an
import, those under TYPE_CHECKING and those of a stub included. In the picture an arrow that follows
from others is left out; the table has them all. Boxes stand in layers, each below whatever imports
it, in the order that crosses fewest arrows.
"""

import argparse
import ast
import sys
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cache
from graphlib import CycleError, TopologicalSorter
from html import escape
from itertools import pairwise
from pathlib import Path

import grimp

ROOT = Path(__file__).parents[1]
SRC, PICTURE, PAGE = ROOT / "src", ROOT / "docs/architecture.svg", ROOT / "docs/architecture.md"
PACKAGES = ("megacontext", "lensnet_guard")  # top to bottom
BEGIN, END = "<!-- drawn: make picture -->", "<!-- end of what is drawn -->"
GROUND = "ground"

Imports = dict[str, set[str]]


# What is there -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Box:
    """What is drawn as one.

    Attributes:
        name: As it is shown: ``calls/``, ``guard`` or the package's name.
        package: The package that it is in.
        modules: Its modules, in full.
        about: The first line of what it says of itself.
    """

    name: str
    package: str
    modules: tuple[str, ...]
    about: str

    @property
    def key(self) -> str:
        """Its name, unique among both packages."""
        return f"{self.package}.{self.name}"


def path_of(module: str) -> Path:
    """The file of a module."""
    path = SRC.joinpath(*module.split("."))
    return path / "__init__.py" if path.is_dir() else path.with_suffix(".py")


def first_line(module: str) -> str:
    """What a module says of itself in its first line."""
    return (ast.get_docstring(ast.parse(path_of(module).read_text())) or "").partition("\n")[0]


def read_imports() -> Imports:
    """What each module of both packages imports from them; what a stub names is imported too."""
    sys.path.insert(0, str(SRC))
    graph = grimp.build_graph(*PACKAGES, cache_dir=None)
    modules = [m for m in sorted(graph.modules) if not m.endswith(".__main__")]
    imports = {m: set(graph.find_modules_directly_imported_by(m)) for m in modules}
    for package in PACKAGES:
        stub = SRC / package / "__init__.pyi"
        lines = ast.parse(stub.read_text()).body if stub.exists() else []
        imports[package] |= {str(n.module) for n in lines if isinstance(n, ast.ImportFrom)}
    return imports


def boxes_of(package: str, imports: Imports) -> list[Box]:
    """The boxes of a package, by name."""
    inside = sorted(m for m in imports if m.startswith(f"{package}."))
    folders = sorted(
        m for m in inside if m.count(".") == 1 and path_of(m).parent.name == m[len(package) + 1 :]
    )

    def within(folder: str) -> tuple[str, ...]:
        return tuple(m for m in inside if m == folder or m.startswith(f"{folder}."))

    boxes = [Box(f"{f.rpartition('.')[2]}/", package, within(f), first_line(f)) for f in folders]
    rooms = {m for box in boxes for m in box.modules}
    roots = [m for m in inside if m not in rooms]
    above = {m for m in roots if reached(m, imports) & rooms}
    boxes += [Box(m.rpartition(".")[2], package, (m,), first_line(m)) for m in above]
    ground = tuple(m for m in roots if m not in above)
    names = ", ".join(m.rpartition(".")[2] for m in ground)
    boxes.append(Box(GROUND, package, ground, names))
    boxes.append(Box(package, package, (package,), first_line(package)))
    return sorted(boxes, key=lambda box: box.name)


def reached(start: str, imports: Imports) -> set[str]:
    """All that a module or box imports, and what that imports, without end."""
    found: set[str] = set()
    todo = [start]
    while todo:
        new = imports.get(todo.pop(), set()) - found
        found |= new
        todo += new
    return found


def between(boxes: list[Box], imports: Imports) -> Imports:
    """Which box imports which."""
    home = {module: box.key for box in boxes for module in box.modules}
    arrows: Imports = {box.key: set() for box in boxes}
    for module, others in imports.items():
        arrows[home[module]] |= {home[other] for other in others} - {home[module]}
    return arrows


def reduced(arrows: Imports) -> Imports:
    """Arrows without those that follow from others.

    Raises:
        SystemExit: They go in a circle; it names the boxes.
    """
    try:
        TopologicalSorter(arrows).prepare()
    except CycleError as circle:
        raise SystemExit(f"these import each other: {' -> '.join(circle.args[1])}") from None
    return {
        box: {o for o in others if not any(o in reached(p, arrows) for p in others - {o})}
        for box, others in arrows.items()
    }


# Where it goes -----------------------------------------------------------------------------------

Node = tuple[str, ...]  # a box's key alone; or an arrow's two ends and the layer that it crosses
Layers = list[list[Node]]
Chain = list[Node]


def layers_of(boxes: list[Box], arrows: Imports) -> dict[str, int]:
    """The layer of each box, from the top, each package below the one before it."""
    importers: Imports = defaultdict(set)
    for box, others in arrows.items():
        for other in others:
            importers[other].add(box)
    found: dict[str, int] = {}
    first = 0
    for package in PACKAGES:
        own = {box.key for box in boxes if box.package == package}

        @cache
        def depth(box: str, own: frozenset[str] = frozenset(own)) -> int:
            return max((depth(i) + 1 for i in importers[box] & own), default=0)

        found |= {box: first + depth(box) for box in sorted(own)}
        first = max(found.values()) + 1
    return found


def chains_of(layer: dict[str, int], arrows: Imports) -> list[Chain]:
    """Every arrow as the nodes that it runs through, one a layer."""
    return [
        [(box,), *((box, other, str(n)) for n in range(layer[box] + 1, layer[other])), (other,)]
        for box, others in sorted(arrows.items())
        for other in sorted(others)
    ]


def ordered(layer: dict[str, int], chains: list[Chain]) -> Layers:
    """The nodes of each layer, left to right, by the means of their neighbours' places."""
    layers: Layers = [[] for _ in range(max(layer.values()) + 1)]
    for node in sorted({(box,) for box in layer} | {n for chain in chains for n in chain}):
        layers[int(node[2]) if len(node) == 3 else layer[node[0]]].append(node)
    above, below = neighbours(chains)
    best = [list(row) for row in layers]
    for sweep in range(40):
        down = sweep % 2 == 0
        numbers = range(1, len(layers)) if down else range(len(layers) - 2, -1, -1)
        for number in numbers:
            fixed = layers[number - 1 if down else number + 1]
            place = {node: i for i, node in enumerate(fixed)}
            nearest = above if down else below
            row = layers[number]
            means = {
                node: mean([place[n] for n in nearest[node]], i * len(fixed) / len(row))
                for i, node in enumerate(row)
            }
            row.sort(key=lambda node: means[node])
        if crossings(layers, below) < crossings(best, below):
            best = [list(row) for row in layers]
    return best


def neighbours(chains: list[Chain]) -> tuple[dict[Node, list[Node]], dict[Node, list[Node]]]:
    """The nodes right above and right below each node."""
    above: dict[Node, list[Node]] = defaultdict(list)
    below: dict[Node, list[Node]] = defaultdict(list)
    for chain in chains:
        for upper, lower in pairwise(chain):
            above[lower].append(upper)
            below[upper].append(lower)
    return above, below


def mean(values: Iterable[float], otherwise: float) -> float:
    """The mean of what there is."""
    found = list(values)
    return sum(found) / len(found) if found else otherwise


def crossings(layers: Layers, below: dict[Node, list[Node]]) -> int:
    """How many pairs of arrows cross."""
    total = 0
    for upper, lower in pairwise(layers):
        place = {node: i for i, node in enumerate(lower)}
        ends = [place[n] for node in upper for n in sorted(below[node], key=lambda n: place[n])]
        starts = [i for i, node in enumerate(upper) for _ in below[node]]
        pairs = list(zip(starts, ends, strict=True))
        total += sum(a < c and b > d for i, (a, b) in enumerate(pairs) for c, d in pairs[i + 1 :])
    return total


def placed(layers: Layers, chains: list[Chain], width: dict[Node, float]) -> dict[Node, float]:
    """The middle of each node, in pixels from the left: near its neighbours, in its order."""
    above, below = neighbours(chains)
    x: dict[Node, float] = {}
    for row in layers:
        right = -(sum(width[node] for node in row) + GAP * (len(row) - 1)) / 2
        for node in row:
            x[node] = right + width[node] / 2
            right += width[node] + GAP
    for sweep in range(60):
        for row in layers if sweep % 2 else reversed(layers):
            wanted = [mean([x[n] for n in above[node] + below[node]], x[node]) for node in row]
            x |= dict(zip(row, apart(wanted, [width[node] for node in row]), strict=True))
    left = min(x[node] - width[node] / 2 for node in x)
    return {node: value - left for node, value in x.items()}


def apart(wanted: list[float], widths: list[float]) -> list[float]:
    """Places next to what is wanted, in the order given, that leave room for each width."""
    offsets = [0.0]
    for one, other in pairwise(widths):
        offsets.append(offsets[-1] + (one + other) / 2 + GAP)
    blocks: list[list[float]] = []  # sums and lengths of runs that stand wall to wall
    for value, offset in zip(wanted, offsets, strict=True):
        blocks.append([value - offset, 1])
        while len(blocks) > 1 and blocks[-2][0] / blocks[-2][1] > blocks[-1][0] / blocks[-1][1]:
            total, length = blocks.pop()
            blocks[-1][0] += total
            blocks[-1][1] += length
    starts = [total / length for total, length in blocks for _ in range(int(length))]
    return [start + offset for start, offset in zip(starts, offsets, strict=True)]


# How it looks ------------------------------------------------------------------------------------

GAP, ROW_GAP, MARGIN, LINE_PX, LINE_CHARACTERS = 18, 28, 16, 13, 38
COLOURS = {"megacontext": ("#f3f8f7", "#00796b"), "lensnet_guard": ("#f5f5fb", "#3949ab")}


def words(box: Box) -> list[str]:
    """What else stands in a box: the modules of a folder, in lines of a few."""
    if box.name == box.package:
        return ["what users import"]
    if len(box.modules) == 1:
        return []
    folder = f"{box.package}.{box.name.rstrip('/')}"
    lines = [""]
    for module in box.modules:
        name = module.removeprefix(f"{box.package}.").removeprefix(f"{box.name.rstrip('/')}.")
        if module != folder and not name.startswith("__"):
            if len(lines[-1]) + len(name) > LINE_CHARACTERS:
                lines.append("")
            lines[-1] += f"{name}  "
    return [line.rstrip() for line in lines]


def svg(boxes: list[Box], arrows: Imports) -> str:
    """The picture."""
    layer = layers_of(boxes, arrows)
    chains = chains_of(layer, arrows)
    layers = ordered(layer, chains)
    of: dict[Node, Box] = {(box.key,): box for box in boxes}
    width = {n: box_width(of[n]) if n in of else 10.0 for row in layers for n in row}
    height = {node: 30.0 + LINE_PX * len(words(box)) for node, box in of.items()}
    x = {node: value + 2 * MARGIN for node, value in placed(layers, chains, width).items()}
    right = max(x[node] + width[node] / 2 for node in x) + 2 * MARGIN
    parts: list[str] = []
    y: dict[Node, float] = {}  # of a node's upper edge
    top = 0.0
    for package in PACKAGES:
        rows = [r for r in layers if any(n in of and of[n].package == package for n in r)]
        begin = top + MARGIN
        top = begin + 30
        for row in rows:
            tall = max(height[node] for node in row if node in of)
            height |= {node: tall for node in row if node not in of}
            y |= {node: top + (tall - height[node]) / 2 for node in row}
            top += tall + ROW_GAP
        top -= ROW_GAP - MARGIN
        parts.append(backdrop(package, begin, right - 2 * MARGIN, top - begin))
    parts += [line(chain, x, y, width, height, chains) for chain in chains]
    parts += [rectangle(box, x[n], y[n], width[n], height[n]) for n, box in of.items()]
    size = f"{right:.0f} {top + MARGIN:.0f}"
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {size}" '
        'font-family="Roboto, Helvetica, Arial, sans-serif">\n'
        '<defs><marker id="head" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="7" '
        'markerHeight="7" orient="auto"><path d="M0,0 L8,4 L0,8 z" fill="#78909c"/></marker>'
        "</defs>\n"
        f'<rect width="100%" height="100%" fill="#ffffff"/>\n{"".join(parts)}</svg>\n'
    )


def box_width(box: Box) -> float:
    """In pixels; wide enough for any usual sans-serif."""
    return max([len(box.name) * 8.4, *(len(text) * 6.0 for text in words(box))]) + 20


def backdrop(package: str, y: float, width: float, height: float) -> str:
    """What the boxes of a package stand on."""
    fill, colour = COLOURS[package]
    return (
        f'<rect x="{MARGIN}" y="{y:.0f}" width="{width:.0f}" height="{height:.0f}" rx="8" '
        f'fill="{fill}" stroke="{colour}" stroke-opacity="0.3"/>\n'
        f'<text x="{MARGIN + 10}" y="{y + 20:.0f}" font-size="13" fill="{colour}">'
        f"src/{package}/</text>\n"
    )


def rectangle(box: Box, x: float, top: float, width: float, height: float) -> str:
    """A box, with its modules in it."""
    colour = COLOURS[box.package][1]
    fill = "#ffffff" if box.name.endswith("/") else "#fffdf2"
    texts = "".join(
        f'<text x="{x:.0f}" y="{top + 33 + LINE_PX * i:.0f}" font-size="10.5" fill="#455a64" '
        f'text-anchor="middle">{escape(text)}</text>\n'
        for i, text in enumerate(words(box))
    )
    return (
        f'<rect x="{x - width / 2:.0f}" y="{top:.0f}" width="{width:.0f}" height="{height:.0f}" '
        f'rx="5" fill="{fill}" stroke="{colour}"/>\n'
        f'<text x="{x:.0f}" y="{top + 19:.0f}" font-size="13" font-weight="bold" fill="{colour}" '
        f'text-anchor="middle">{escape(box.name)}</text>\n{texts}'
    )


def line(
    chain: Chain,
    x: dict[Node, float],
    y: dict[Node, float],
    width: dict[Node, float],
    height: dict[Node, float],
    chains: list[Chain],
) -> str:
    """An arrow from the bottom of a box to the top of another, each in a place of its own there."""
    first, last = chain[0], chain[-1]
    leaving = sorted((c for c in chains if c[0] == first), key=lambda c: x[c[1]])
    coming = sorted((c for c in chains if c[-1] == last), key=lambda c: x[c[-2]])
    points = [
        (port(x[first], width[first], leaving.index(chain), len(leaving)), y[first] + height[first])
    ]
    for node in chain[1:-1]:
        points += [(x[node], y[node]), (x[node], y[node] + height[node])]
    points.append((port(x[last], width[last], coming.index(chain), len(coming)), y[last]))
    path = f"M{points[0][0]:.0f},{points[0][1]:.0f}"
    for (x0, y0), (x1, y1) in pairwise(points):
        half = (y0 + y1) / 2
        path += f" C{x0:.0f},{half:.0f} {x1:.0f},{half:.0f} {x1:.0f},{y1:.0f}"
    return (
        f'<path d="{path}" fill="none" stroke="#78909c" stroke-width="1.2" '
        'marker-end="url(#head)"/>\n'
    )


def port(x: float, width: float, number: int, count: int) -> float:
    """Where on a box's edge an arrow leaves or comes, out of so many."""
    return x + width * 0.7 * ((number + 0.5) / count - 0.5)


def table(boxes: list[Box], arrows: Imports) -> str:
    """Each box, what is in it, and all that it imports."""
    names = {
        box.key: box.name if box.name != GROUND else f"{GROUND} of {box.package}" for box in boxes
    }
    rows = ["| | what is in it | imports |", "|---|---|---|"]
    for box in sorted(
        boxes, key=lambda b: (PACKAGES.index(b.package), b.name != b.package, b.name)
    ):
        others = [names[o] for o in sorted(arrows[box.key])]
        about = box.about.replace("|", "\\|").replace("``", "`").rstrip(".")
        rows.append(f"| `{box.package}` {box.name} | {about} | {', '.join(others)} |")
    return "\n".join(rows)


def main() -> None:
    """Draw, or look whether what is drawn is so."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--check", action="store_true", help="write nothing")
    check = parser.parse_args().check
    imports = read_imports()
    boxes = [box for package in PACKAGES for box in boxes_of(package, imports)]
    arrows = between(boxes, imports)
    before, begin, rest = PAGE.read_text().partition(BEGIN)
    _, end, after = rest.partition(END)
    if not (begin and end):
        raise SystemExit(f"{PAGE} has lost its markers {BEGIN} and {END}")
    made = {
        PICTURE: svg(boxes, reduced(arrows)),
        PAGE: f"{before}{begin}\n\n{table(boxes, arrows)}\n\n{end}{after}",
    }
    stale = [path for path, text in made.items() if not path.exists() or path.read_text() != text]
    if stale and check:
        names = " and ".join(str(path.relative_to(ROOT)) for path in stale)
        raise SystemExit(f"{names}: not what the code imports any more; run make picture")
    for path in stale:
        path.write_text(made[path])


if __name__ == "__main__":
    main()
