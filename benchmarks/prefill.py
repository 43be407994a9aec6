"""Tokens per second of reading a prompt: our engine with and without its neurons, llama.cpp and transformers.

Does: let all of them read the same text from nothing up to the logits of its last token, taking turns in one run;
llama.cpp with the micro-batch and the kind of attention that a first try finds fastest. Does not: judge what is
predicted.

    python benchmarks/prefill.py STUDENT [--peer-python PATH --peer-gguf FILE ...] [--threads 1 2] [--json]
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping
from functools import partial
from typing import Any

from runners import OURS, LlamaRunner, Runner, add_options, llama_facts, started, text_tokens, with_best
from timing import arguments, environment, finish, settings, show, speedup, turns

MICRO_BATCHES = (128, 512, 2048)


def measure(runners: Mapping[str, Runner], tokens: list[int], threads: int, rounds: int) -> dict[str, Any]:
    """Medians and ratios of one length, and the rounds that they come from."""
    able = {name: runner for name, runner in runners.items() if len(tokens) <= (runner.longest or len(tokens))}
    for name, runner in able.items():
        if isinstance(runner, LlamaRunner):
            able[name] = runner.fastest(MICRO_BATCHES, lambda tried: tried.prefill(tokens, threads))
    llama = {name: runner for name, runner in able.items() if isinstance(runner, LlamaRunner)}
    seconds = turns({name: partial(runner.prefill, tokens, threads) for name, runner in able.items()}, rounds)
    return {
        "tokens": len(tokens),
        "threads": threads,
        "tokens_per_s": {name: len(tokens) / statistics.median(values) for name, values in seconds.items()},
        "ratio": with_best({name: speedup(seconds, OURS, name) for name in able if name != OURS}),
        "micro_batch": {name: runner.ubatch for name, runner in llama.items()},
        "flash_attention": {name: runner.flash for name, runner in llama.items()},
        "seconds": seconds,
    }


def main(argv: list[str] | None = None) -> None:
    """Measure and print."""
    parser = arguments(__doc__, several_threads=True)
    add_options(parser)
    parser.add_argument("--lengths", type=int, nargs="+", default=[2048, 512], help="tokens read")
    parser.add_argument("--rounds", type=int, default=5, help="timed turns of each")
    options = parser.parse_args(argv)
    text = text_tokens(options.text, options.student, max(options.lengths))
    with started(options) as runners:
        cases = [
            measure(runners, text[:length], threads, options.rounds)
            for threads in options.threads
            for length in options.lengths
        ]
        llama = llama_facts(runners)
    for case in cases:
        show(
            f"prefill of {case['tokens']} tokens, {case['threads']} threads",
            ["", "tok/s", "ours is faster by", "micro-batch"],
            [
                [name, speed, case["ratio"].get(name), case["micro_batch"].get(name)]
                for name, speed in case["tokens_per_s"].items()
            ],
        )
    # the head line: the longest text on the most threads
    first = max(cases, key=lambda case: (case["tokens"], case["threads"]))
    found = {
        "benchmark": "prefill",
        "environment": environment(),
        "settings": settings(options),
        "llama_cpp": llama,
        **{name: first[name] for name in ("tokens", "threads", "tokens_per_s", "ratio")},
        "cases": cases,
    }
    finish(found, options)


if __name__ == "__main__":
    main()
