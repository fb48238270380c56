"""Grading hostile text: every item gets its verdict in its time, and nothing is left behind."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tip_exp.grading.pool import GradingPool

TIME_LIMIT_S = 1.0
SLACK_S = 1.0  # between the limit and the verdict, on a machine that has other things to do


def box(content: str) -> str:
    return f"\\boxed{{{content}}}"


HOSTILE = {
    # numbers that no machine can write down
    "power tower": box("9^{9^{9^9}}"),
    "low power tower": box("9^{9^9}"),
    "factorial": box("(10^9)!"),
    "factorials": box("((100!)!)!"),
    "binomial": box(r"\binom{10^9}{5\cdot 10^8}"),
    "digits": box("9" * 1990),
    "power of digits": box("9" * 900 + "^{" + "9" * 900 + "}"),
    "root": box(r"\sqrt[99999999]{2}"),
    "gamma": box(r"\Gamma(10^{10})"),
    "modulus": box(r"7^{7^{7^7}} \bmod 10"),
    "gcd": box(r"\gcd(10^{10^{8}}, 6)"),
    "floor": box(r"\lfloor \pi^{10^9} \rfloor"),
    "totient": box(r"\phi(10^{100}+267)"),
    "decimal power": box("10.5^{1000000000}"),
    "long decimal": box("0." + "3" * 1900),
    "exponent": box("1e999999999"),
    "wide interval": box(r"[9^{9^9}, \infty)"),
    # algebra without end
    "sum": box(r"\sum_{n=1}^{10^{12}} \sin(n)"),
    "product": box(r"\prod_{n=1}^{10^8} n"),
    "integral": box(r"\int_0^1 \sin(x^{x^x})\,dx"),
    "limit": box(r"\lim_{x\to 0}\frac{\sin(\tan x)-\tan(\sin x)}{x^7}"),
    "binomial expansion": box("(x+1)^{100000}"),
    "multinomial expansion": box("(a+b+c+d+e+f+g)^{60}"),
    "matrix power": box(r"\begin{pmatrix}1&1\\1&0\end{pmatrix}^{100000000}"),
    "big matrix": box(r"\begin{pmatrix}" + r"\\".join(["&".join("1" * 20)] * 20) + r"\end{pmatrix}"),
    "equation": box("x^{50}+x^{49}+y^{48}+7x+1=0"),
    "trigonometry": box(r"\sin^{100}(x)+\cos^{100}(x)+\tan^{100}(x)"),
    "set": box(r"\{" + ",".join(map(str, range(480))) + r"\}"),
    "signs": box(r"1\pm" * 20 + "1"),
    # no numbers at all
    "division by zero": box(r"\frac{1}{0}"),
    "infinities": box(r"\infty-\infty"),
    "nan": box("nan"),
    "logarithms": box(r"\log(\log(\log(0)))"),
    # deep and long
    "deep fraction": box(r"\frac{1}{" * 200 + "2" + "}" * 200),
    "deep root": box(r"\sqrt{" * 250 + "2" + "}" * 250),
    "deep parentheses": box("(" * 900 + "6" + ")" * 900),
    "deep braces": box("{" * 900 + "6" + "}" * 900),
    "deep text": box(r"\text{" * 280 + "}" * 280),
    "bars": box("|" * 1500 + "5"),
    "minuses": box("-" * 1900 + "6"),
    "long sum": box("1+" * 900 + "1"),
    "long product": box("x" * 1900),
    "powers": box("2^" * 600 + "2"),
    "equals signs": box("=" * 1900),
    "commas": box("1," * 950 + "1"),
    # regular expressions that look back
    "squares": box("5 " + "square " * 250 + "x"),
    "blanks": box("5" + " " * 1900 + "x"),
    "percents": box("%" * 1900),
    "mixed numbers": box("1 " * 950),
    "fractions": box(r"\frac" * 390),
    "roots": box("sqrt(" * 390),
    "powers of brackets": box("^(" * 900),
    # ten megabytes
    "open boxes": "\\boxed{" * 1_400_000,
    "open braces": "\\boxed{" + "{" * 10_000_000,
    "a long box": box("1" * 10_000_000),
    "many digits": "9" * 10_000_000,
    "many dollars": "$" * 10_000_000,
    "many phrases": "the answer is " * 700_000,
    "many backslashes": "\\" * 10_000_000,
    "an end": "x" * 10_000_000 + box("6"),
    # odd characters and foreign code
    "nulls": box("\x00" * 1000),
    "half a character": box("\ud83d"),
    "emoji": box("😀" * 900),
    "direction": box("\u202e6\u202c"),
    "Python": box("__import__('os')._exit(1)"),
    "TeX": box(r"\input{/etc/passwd}\write18{exit}"),
    "nothing": "",
}


@pytest.fixture(scope="module")
def pool() -> Iterator[GradingPool]:
    with GradingPool(2, time_limit=TIME_LIMIT_S) as pool:
        yield pool


def workers_of(pid: int) -> list[int]:
    children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    return [int(child) for child in children if b"grading.pool" in Path(f"/proc/{child}/cmdline").read_bytes()]


def wait_for(what: str, condition: Callable[[], bool], seconds: float) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"no {what} within {seconds} s"
        time.sleep(0.02)


def ended(pid: int) -> bool:
    """Gone, or a zombie that its new parent has not collected."""
    try:
        return re.search(r"^State:\s+Z", Path(f"/proc/{pid}/status").read_text(), re.MULTILINE) is not None
    except OSError:
        return True


def test_verdicts_come_in_the_order_of_the_pairs(pool: GradingPool) -> None:
    # every third is slow, every fifth says nothing
    texts = [("" if n % 5 == 0 else box(rf"\frac{{{2 * n}}}{{2}}") if n % 3 == 0 else box(str(n))) for n in range(60)]
    verdicts = pool.grade_all((text, str(n)) for n, text in enumerate(texts))
    assert [verdict.right for verdict in verdicts] == [n % 5 != 0 for n in range(60)]
    assert {verdict.rule for verdict in verdicts} == {"boxed", "unparsed"}


def test_no_pairs_no_verdicts(pool: GradingPool) -> None:
    assert pool.grade_all([]) == []


def test_a_pool_grades_one_text_as_a_grader_does(pool: GradingPool) -> None:
    verdict = pool.grade("The answer is $1/2$.", "0.5")
    assert (verdict.right, verdict.extracted, verdict.rule) == (True, "1/2", "answer_phrase")


def assert_harmless(pool: GradingPool, names: list[str]) -> None:
    verdicts = pool.grade_all((HOSTILE[name], "5") for name in names)
    for name, verdict in zip(names, verdicts, strict=True):
        assert not verdict.right, name
        assert verdict.seconds < TIME_LIMIT_S + SLACK_S, name
        assert verdict.rule in ("boxed", "answer_phrase", "unparsed", "timeout", "memory"), name
        assert (verdict.extracted is None) == (verdict.rule == "unparsed"), name
    assert pool.grade(box("5"), "5").right


def test_hostile_text_harms_nothing(pool: GradingPool) -> None:
    assert_harmless(pool, ["power tower", "deep root", "commas", "half a character", "a long box", "Python", "nothing"])


@pytest.mark.slow
def test_all_hostile_texts_harm_nothing(pool: GradingPool) -> None:
    assert len(HOSTILE) >= 60
    assert_harmless(pool, list(HOSTILE))


def test_what_overruns_is_a_timeout_and_its_neighbours_are_not(pool: GradingPool) -> None:
    tower = HOSTILE["power tower"]
    verdicts = pool.grade_all([(tower, "5"), (box("5"), "5"), (tower, "5"), (box("6"), "5")])
    assert [verdict.rule for verdict in verdicts] == ["timeout", "boxed", "timeout", "boxed"]
    assert [verdict.right for verdict in verdicts] == [False, True, False, False]
    assert verdicts[0].extracted == "9^{9^{9^9}}"


def test_an_abandoned_stream_does_not_answer_into_the_next(pool: GradingPool) -> None:
    stream = pool.stream([(box("1"), "1"), (HOSTILE["power tower"], "5"), (HOSTILE["factorial"], "5")])
    assert next(stream).right
    stream.close()  # while number 1 is at work
    rights = [verdict.right for verdict in pool.grade_all([(box(str(n)), "1") for n in range(4)])]
    assert rights == [False, True, False, False]


def test_a_worker_that_dies_idle_costs_nothing_and_busy_one_verdict() -> None:
    with GradingPool(1, time_limit=30) as pool:
        assert pool.grade(box("5"), "5").right
        (worker,) = workers_of(os.getpid())[-1:]
        os.kill(worker, signal.SIGKILL)
        wait_for("end of the worker", lambda: ended(worker), 5)
        assert pool.grade(box("5"), "5").right
        (worker,) = workers_of(os.getpid())[-1:]
        threading.Timer(0.3, os.kill, (worker, signal.SIGKILL)).start()
        verdicts = pool.grade_all([(HOSTILE["power tower"], "5"), (box("5"), "5")])
        assert [(verdict.right, verdict.rule) for verdict in verdicts] == [(False, "crashed"), (True, "boxed")]


def test_a_worker_has_its_memory_and_not_more() -> None:
    with GradingPool(1, memory_limit_mib=256) as pool:
        # A known answer of 80 MB: its request and the strings made of it do not fit.
        verdicts = pool.grade_all([(box(r"\sqrt{2}"), "1+" * 40_000_000), (box("5"), "5")])
    assert verdicts[0].rule in ("memory", "crashed")
    assert verdicts[1].right


def test_a_worker_that_cannot_start_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(sys, "path", [])
        pool = GradingPool(2)
    with pool, pytest.raises(RuntimeError, match="ended as it started, with exit code 1"):
        pool.grade(box("5"), "5")


def test_a_closed_pool_refuses_and_bad_limits_are_named() -> None:
    pool = GradingPool(1)
    pool.close()
    pool.close()
    with pytest.raises(ValueError, match="closed"):
        pool.grade(box("5"), "5")
    for wrong in ({"workers": 0}, {"workers": 1, "time_limit": 0.0}, {"workers": 1, "memory_limit_mib": 64}):
        with pytest.raises(ValueError, match=r"workers >= 1, time_limit > 0 s and memory_limit_mib >= 256"):
            GradingPool(**wrong)


BUSY = """
    import signal
    signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored where these tests are a script's background job
    from tip_exp.grading.pool import GradingPool
    pool = GradingPool(2, time_limit={time_limit})
    pool.grade_all([({five!r}, "5")] * 4)
    print("started", flush=True)
    {then}
"""


def caller(then: str, time_limit: float = 60.0) -> subprocess.Popen[str]:
    """A process with two workers, that has just begun with `then`."""
    program = textwrap.dedent(BUSY).format(time_limit=time_limit, five=box("5"), then=then)
    process = subprocess.Popen(
        [sys.executable, "-c", program], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, process_group=0
    )
    assert process.stdout and process.stdout.readline() == "started\n"
    return process


HANG = f"pool.grade_all([({HOSTILE['power tower']!r}, '5')] * 2)"


def test_the_end_of_the_caller_is_the_end_of_the_workers() -> None:
    process = caller("import time; time.sleep(0.3)")  # a pool that nobody closes
    workers = workers_of(process.pid)
    assert len(workers) == 2
    _, errors = process.communicate(timeout=20)
    assert (process.returncode, errors) == (0, "")
    assert all(ended(worker) for worker in workers)


def test_an_interrupt_ends_the_workers_and_is_the_callers_to_handle() -> None:
    process = caller(HANG)
    workers = workers_of(process.pid)
    time.sleep(0.3)
    os.killpg(process.pid, signal.SIGINT)  # as the terminal does
    _, errors = process.communicate(timeout=20)
    assert process.returncode != 0
    assert errors.count("KeyboardInterrupt") == 1  # and no traceback of a worker
    assert len(workers) == 2
    assert all(ended(worker) for worker in workers)


def test_an_interrupt_that_the_caller_outlives_costs_no_verdict() -> None:
    # a sum whose parsing takes Python seconds, so that an interrupt would end it
    long_sum = box("1+" * 900 + "1")
    process = caller(
        "import signal; signal.signal(signal.SIGINT, lambda *_: None); print('deaf', flush=True); "
        f"print(pool.grade({long_sum!r}, '901').rule)"
    )
    assert process.stdout and process.stdout.readline() == "deaf\n"
    time.sleep(0.2)
    os.killpg(process.pid, signal.SIGINT)
    assert process.communicate(timeout=60) == ("boxed\n", "")


@pytest.mark.slow
def test_busy_workers_of_a_killed_caller_end_with_their_time() -> None:
    process = caller(HANG, time_limit=1.0)
    workers = workers_of(process.pid)
    process.kill()
    process.communicate(timeout=20)
    assert len(workers) == 2
    wait_for("end of the workers", lambda: all(ended(worker) for worker in workers), 60)


def test_workers_of_a_caller_with_torch_have_none(tmp_path: Path) -> None:
    script = tmp_path / "caller.py"  # its top level imports torch and has no guard: multiprocessing would run it again
    script.write_text(
        "import torch, os\n"
        "from pathlib import Path\n"
        "from tip_exp.grading.pool import GradingPool\n"
        "with GradingPool(1) as pool:\n"
        f"    right = pool.grade({box('5')!r}, '5').right\n"
        "    child = Path(f'/proc/self/task/{os.getpid()}/children').read_text().split()[-1]\n"
        "    print(right, *('torch' in Path(f'/proc/{pid}/maps').read_text() for pid in (child, os.getpid())))\n"
    )
    done = subprocess.run([sys.executable, str(script)], capture_output=True, text=True, timeout=120)
    assert (done.stdout, done.stderr) == ("True False True\n", "")
