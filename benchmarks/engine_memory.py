"""Memory of a process that runs the engine and nothing else, beside the size of its packed file.

Does: pack here, then start a fresh process that imports mar.engine alone, reads a prompt, decodes, and says what was
resident at its peak. Does not: count the page cache twice: a packed file is mapped, and processes share it. Linux only.

    python benchmarks/engine_memory.py STUDENT [--precision int8] [--prompt 512] [--tokens 64] [--json]
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch

from mar import _native
from mar.engine.pack import PRECISIONS, pack_settings, packed_file
from timing import arguments, environment, finish, settings, show

PROGRAM = """
import json, sys
from pathlib import Path
from mar.engine import Engine
packed, threads, prompt, tokens = sys.argv[1], *map(int, sys.argv[2:])
engine = Engine(Path(packed), threads)
state = engine.new_state()
engine.prefill(state, [5] * prompt)
for _ in range(tokens):
    engine.step(state, 5)
fields = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
found = {name: int(fields[name].split()[0]) * 1024 for name in ("VmHWM", "VmRSS", "RssFile", "RssAnon")}
print(json.dumps(found | {"torch": "torch" in sys.modules}))
"""
ALLOWED = 1.3, 60e6
"""The plan: so many times the packed file, and so many bytes more."""


def measure(packed: Path, threads: int, prompt: int, tokens: int) -> dict[str, Any]:
    """Bytes of the file and of the process: at its peak, and of what it mapped and allocated at its end."""
    command = [sys.executable, "-c", PROGRAM, str(packed), *map(str, (threads, prompt, tokens))]
    found = json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
    size = packed.stat().st_size
    return {
        "packed": size,
        "peak": found["VmHWM"],
        "resident": found["VmRSS"],
        "mapped": found["RssFile"],
        "allocated": found["RssAnon"],
        "imported_torch": found["torch"],
        "allowed": ALLOWED[0] * size + ALLOWED[1],
    }


def main(argv: list[str] | None = None) -> None:
    """Measure and print."""
    parser = arguments(__doc__)
    parser.add_argument("student", type=Path)
    parser.add_argument("--precision", nargs="+", choices=PRECISIONS, default=["int8", "int4"])
    parser.add_argument("--prompt", type=int, default=512, help="tokens read at once")
    parser.add_argument("--tokens", type=int, default=64, help="tokens decoded after them")
    options = parser.parse_args(argv)
    torch.set_num_threads(options.threads)
    found = {}
    for precision in options.precision:
        packed = packed_file(options.student, pack_settings(options.student, precision, None, True, _native.PANEL))
        found[precision] = measure(packed, options.threads, options.prompt, options.tokens)
    figures = ("packed", "peak", "allowed", "mapped", "allocated")
    rows = [[name, *(one[figure] / 1e6 for figure in figures)] for name, one in found.items()]
    show("megabytes of a process that runs the engine alone", ["", *figures], rows)
    finish({"environment": environment(), "settings": settings(options), "bytes": found}, options)


if __name__ == "__main__":
    main()
