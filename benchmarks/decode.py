"""Tokens per second of decoding one sequence: our engine with and without its neurons, llama.cpp and transformers.

Does: let all of them continue the same text, at several contexts and thread counts, all taking turns in one run with a
plain read of memory; count the spikes and the bytes of the tokens that were timed. Does not: judge what is predicted. A
context longer than a model was trained for is timed all the same where the runner allows it, and llama.cpp's cache is
filled with copies of a shorter text: the time depends on how much the cache or state holds, not on what.

    python benchmarks/decode.py STUDENT [--peer-python PATH --peer-gguf FILE ...] [--threads 1 2] [--json]
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

from runners import OURS, EngineRunner, LlamaRunner, Runner, add_options, llama_facts, started, text_tokens, with_best
from timing import arguments, environment, finish, memory_read, settings, show, speedup, turns

Case = tuple[str, int, int]
"""Runner (or MEMORY), context, threads."""

MEMORY = "memory_read"
WARM = 3
"""Steps at the start of a turn that do not count: the caches still hold another runner's weights."""


def turn(runner: Runner, length: int, tokens: list[int], threads: int) -> float:
    """Seconds a token."""
    return statistics.fmean(runner.decode(length, tokens, threads)[WARM:])


def with_attention(runner: LlamaRunner, read: list[int], following: list[int], threads: int) -> LlamaRunner:
    """llama.cpp with flash attention or without, whichever decodes faster: on CPUs that depends on the context."""

    def time(tried: LlamaRunner) -> float:
        if not tried.opened:
            tried.fill(read, threads)
        return turn(tried, len(read), following, threads)

    return runner.fastest([runner.ubatch], time)


def measure(
    runners: Mapping[str, Runner], text: list[int], contexts: list[int], threads: list[int], tokens: int, rounds: int
) -> tuple[dict[Case, list[float]], dict[str, dict[int, bool]]]:
    """Seconds a token in each round; of MEMORY, whose context is 0, seconds a byte. And where llama.cpp took flash."""
    calls: dict[Case, Callable[[], float]] = {}
    flash: dict[str, dict[int, bool]] = {}
    for context in contexts:
        following = text[context : context + WARM + tokens]
        for name, runner in runners.items():
            if context + len(following) > (runner.longest or math.inf):
                continue
            if isinstance(runner, LlamaRunner):
                runner = with_attention(runner, text[:context], following, max(threads))
                flash.setdefault(name, {})[context] = runner.flash
            else:
                runner.fill(text[:context], max(threads))
            for n in threads:
                calls[name, context, n] = partial(turn, runner, context, following, n)
    return turns(calls | {(MEMORY, 0, n): memory_read(n) for n in threads}, rounds), flash


def ratios(seconds: Mapping[Case, list[float]], context: int, threads: int) -> dict[str, float]:
    """How many times faster ours is than each other runner of a case, and than the fastest file of llama.cpp."""
    names = [name for name, *case in seconds if case == [context, threads] and name != OURS]
    return with_best({name: speedup(seconds, (OURS, context, threads), (name, context, threads)) for name in names})


def figures(seconds: Mapping[Case, list[float]], context: int, threads: int) -> dict[str, Any]:
    """Medians and ratios of one case, and the rounds that they come from."""
    times = {name: values for (name, *case), values in seconds.items() if case == [context, threads]}
    return {
        "context": context,
        "threads": threads,
        "tokens_per_s": {name: 1 / statistics.median(values) for name, values in times.items()},
        "ratio": ratios(seconds, context, threads),
        "seconds_per_token": times,
    }


def bound(case: dict[str, Any], bandwidth: float, counts: dict[str, Any]) -> dict[str, Any]:
    """The counts, the speed of memory in bytes a second, and how near our engine comes to what it allows."""
    needed = counts["linear_bytes_per_token"] + counts["other_bytes_per_token"]
    return counts | {
        "bytes_per_token": needed,
        "memory_gb_per_s": bandwidth / 1e9,
        "bound_tokens_per_s": bandwidth / needed,
        "share_of_bound": case["tokens_per_s"][OURS] * needed / bandwidth,
    }


def main(argv: list[str] | None = None) -> None:
    """Measure and print."""
    parser = arguments(__doc__, several_threads=True)
    add_options(parser)
    parser.add_argument("--contexts", type=int, nargs="+", default=[16, 128, 4000, 32768], help="tokens read before")
    parser.add_argument("--tokens", type=int, default=32, help="decoded in each turn")
    parser.add_argument("--rounds", type=int, default=7, help="timed turns of each case")
    options = parser.parse_args(argv)
    text = text_tokens(options.text, options.student, max(options.contexts) + WARM + options.tokens)
    with started(options) as runners:
        seconds, flash = measure(runners, text, options.contexts, options.threads, options.tokens, options.rounds)
        ours, cases = runners[OURS], []
        assert isinstance(ours, EngineRunner)
        for threads in options.threads:
            bandwidth = 1 / statistics.median(seconds[MEMORY, 0, threads])
            for context in options.contexts:
                case = figures(seconds, context, threads)
                counts = ours.count(context, text[context : context + WARM + options.tokens], threads)
                cases.append(case | bound(case, bandwidth, counts))
        llama = llama_facts(runners)
    for case in cases:
        _show(case)
    # the head line: the shortest context on the most threads
    first = min(cases, key=lambda case: (case["context"], -case["threads"]))
    found = {
        "benchmark": "decode",
        "environment": environment(),
        "settings": settings(options),
        "llama_cpp": llama,
        "flash_attention": flash,
        **{name: first[name] for name in ("context", "threads", "tokens_per_s", "ratio")},
        "cases": cases,
    }
    finish(found, options)


def _show(case: dict[str, Any]) -> None:
    show(
        f"decode at context {case['context']}, {case['threads']} threads: {case['nonzero_share']:.2f} of codes fire, "
        f"{case['share_of_bound']:.0%} of what reading memory allows",
        ["", "tok/s", "ours is faster by"],
        [[name, speed, case["ratio"].get(name)] for name, speed in case["tokens_per_s"].items()],
    )


if __name__ == "__main__":
    main()
