"""Grading hostile text: every pair gets a verdict, and no process outlives the pool."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import pytest

from tip_exp.grading import open_grader, with_retry
from tip_exp.grading.pool import GROUP_TIME_LIMITS, GradingPool
from tip_exp.grading.types import Verdict

TIME_LIMIT_S = 1.0


def box(content: str) -> str:
    return f"\\boxed{{{content}}}"


HOSTILE = {
    # numbers with too many digits
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
    # no number
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
    # backtracking in regular expressions
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
    # control characters and code
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


def grade(pool: GradingPool, text: str, answer: str) -> Verdict:
    return pool.grade_all([(text, answer)])[0]


def workers_of(pid: int) -> list[int]:
    """Worker processes of a process, oldest first."""
    children = {
        int(child) for task in Path(f"/proc/{pid}/task").iterdir() for child in (task / "children").read_text().split()
    }
    return [child for child in sorted(children) if b"grading.pool" in Path(f"/proc/{child}/cmdline").read_bytes()]


def wait_for(what: str, condition: Callable[[], bool], seconds: float) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"no {what} within {seconds} s"
        time.sleep(0.02)


def ended(pid: int) -> bool:
    """The process does not exist, or is a zombie whose parent has not waited for it."""
    try:
        return re.search(r"^State:\s+Z", Path(f"/proc/{pid}/status").read_text(), re.MULTILINE) is not None
    except OSError:
        return True


def test_verdicts_come_in_the_order_of_the_pairs(pool: GradingPool) -> None:
    # every third needs algebra, every fifth has no answer
    texts = [("" if n % 5 == 0 else box(rf"\frac{{{2 * n}}}{{2}}") if n % 3 == 0 else box(str(n))) for n in range(60)]
    verdicts = pool.grade_all((text, str(n)) for n, text in enumerate(texts))
    assert [verdict.right for verdict in verdicts] == [n % 5 != 0 for n in range(60)]
    assert {verdict.rule for verdict in verdicts} == {"boxed", "unparsed"}


def test_no_pairs_give_no_verdicts(pool: GradingPool) -> None:
    assert pool.grade_all([]) == []


def test_a_verdict_has_the_extraction_and_its_rule(pool: GradingPool) -> None:
    verdict = grade(pool, "The answer is $1/2$.", "0.5")
    assert (verdict.right, verdict.extracted, verdict.rule) == (True, "1/2", "answer_phrase")


def assert_graded(pool: GradingPool, names: list[str]) -> None:
    verdicts = pool.grade_all((HOSTILE[name], "5") for name in names)
    for name, verdict in zip(names, verdicts, strict=True):
        assert not verdict.right, name
        assert verdict.rule in ("boxed", "answer_phrase", "unparsed", "timeout", "memory", "uncomparable"), name
        assert (verdict.extracted is None) == (verdict.rule == "unparsed"), name
    assert grade(pool, box("5"), "5").right


def test_hostile_texts_get_a_verdict(pool: GradingPool) -> None:
    assert_graded(pool, ["power tower", "deep root", "commas", "half a character", "a long box", "Python", "nothing"])


@pytest.mark.slow
def test_all_hostile_texts_get_a_verdict(pool: GradingPool) -> None:
    assert len(HOSTILE) >= 60
    assert_graded(pool, list(HOSTILE))


def test_a_hanging_comparison_is_a_timeout_and_the_next_is_not(pool: GradingPool) -> None:
    tower = HOSTILE["power tower"]
    verdicts = pool.grade_all([(tower, "5"), (box("5"), "5"), (tower, "5"), (box("6"), "5")])
    assert [verdict.rule for verdict in verdicts] == ["timeout", "boxed", "timeout", "boxed"]
    assert [verdict.right for verdict in verdicts] == [False, True, False, False]
    assert verdicts[0].extracted == "9^{9^{9^9}}"


def test_answers_are_grouped_by_value(pool: GradingPool) -> None:
    answers = [r"\frac{1}{2}", "3", "0.5", "x = 3", r"\sqrt{4}", " 3", "1/2", "2"]
    assert pool.group_all([answers, [], ["1,000", "1000"]]) == [[0, 1, 0, 1, 2, 1, 0, 2], [], [0, 0]]


def test_grouping_answers_that_hang_takes_bounded_time(pool: GradingPool) -> None:
    """Sixteen power towers take at most GROUP_TIME_LIMITS time limits, and are groups of their own."""
    towers = [f"{n}^{{9^{{9^9}}}}" for n in range(2, 18)]
    compared = []
    worker = pool._workers[0]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(type(worker), "compare", lambda self, a, b: compared.append(a) or ("timeout", TIME_LIMIT_S))
        assert pool.group_all([towers]) == [list(range(16))]
    assert len(compared) == GROUP_TIME_LIMITS


def test_a_comparison_without_a_result_is_tried_once_more() -> None:
    asked: list[list[str]] = []

    def grade_all(pairs: Iterable[tuple[str, str]]) -> list[Verdict]:
        texts = [text for text, _ in pairs]
        asked.append(texts)
        slow = "timeout" if len(asked) == 1 else "boxed"
        rules = {"a": "boxed", "slow": slow, "hard": "crashed", "none": "unparsed"}
        return [Verdict(rules[text] == "boxed", text, rules[text]) for text in texts]

    verdicts = with_retry(grade_all)((text, "5") for text in ("a", "slow", "hard", "none"))
    assert asked == [["a", "slow", "hard", "none"], ["slow", "hard"]]
    assert [verdict.rule for verdict in verdicts] == ["boxed", "boxed", "crashed", "unparsed"]
    assert [verdict.right for verdict in verdicts] == [True, True, False, False]


@pytest.mark.parametrize(("name", "groups"), [("boxed_integer", [0, 0, 1]), ("strict", [0, 1, 2])])
def test_the_equality_of_the_other_graders(name: str, groups: list[int]) -> None:
    with open_grader(name) as grader:
        assert grader.group_all([["7", "07", "8"]]) == [groups]


def test_an_abandoned_stream_does_not_answer_into_the_next(pool: GradingPool) -> None:
    stream = pool.stream([(box("1"), "1"), (HOSTILE["power tower"], "5"), (HOSTILE["factorial"], "5")])
    assert next(stream).right
    stream.close()  # while a comparison is running
    rights = [verdict.right for verdict in pool.grade_all([(box(str(n)), "1") for n in range(4)])]
    assert rights == [False, True, False, False]


def cpu_ticks(pid: int) -> int:
    return sum(map(int, Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[11:13]))


def kill_at_work(pid: int, idle_ticks: int) -> None:
    """Kill a worker once it has computed for some ticks more than while it was idle."""
    wait_for("work", lambda: cpu_ticks(pid) > idle_ticks + 2, 25)
    os.kill(pid, signal.SIGKILL)


def test_a_worker_that_dies_loses_no_verdict_if_idle_and_one_if_busy() -> None:
    with GradingPool(1, time_limit=30) as pool:
        assert grade(pool, box("5"), "5").right
        (worker,) = workers_of(os.getpid())[-1:]
        os.kill(worker, signal.SIGKILL)
        wait_for("end of the worker", lambda: ended(worker), 60)
        assert grade(pool, box("5"), "5").right
        (worker,) = workers_of(os.getpid())[-1:]
        threading.Thread(target=kill_at_work, args=(worker, cpu_ticks(worker))).start()
        verdicts = pool.grade_all([(HOSTILE["power tower"], "5"), (box("5"), "5")])
        assert [(verdict.right, verdict.rule) for verdict in verdicts] == [(False, "crashed"), (True, "boxed")]


def test_the_memory_limit_of_a_worker(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tip_exp.grading.pool.MEMORY_LIMIT_MIB", 256)
    with GradingPool(1) as pool:
        # A reference answer of 120 MB: the request and the string made from it do not fit.
        verdicts = pool.grade_all([(box(r"\sqrt{2}"), "1+" * 60_000_000), (box("5"), "5")])
    assert verdicts[0].rule in ("memory", "crashed")
    assert verdicts[1].right


def test_a_worker_that_cannot_start_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(sys, "path", [])
        pool = GradingPool(2)
    with pool, pytest.raises(RuntimeError, match="ended as it started, with exit code 1"):
        grade(pool, box("5"), "5")


def test_a_closed_pool_is_an_error() -> None:
    pool = GradingPool(1)
    pool.close()
    pool.close()
    with pytest.raises(ValueError, match="closed"):
        grade(pool, box("5"), "5")


BUSY = """
    import signal
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a background job of a script ignores SIGINT
    from tip_exp.grading.pool import GradingPool
    pool = GradingPool(2, time_limit={time_limit})
    pool.grade_all([({five!r}, "5")] * 4)
    print("started", flush=True)
    {then}
"""


def caller(then: str, time_limit: float = 60.0) -> subprocess.Popen[str]:
    """A process with two idle workers that is about to run `then`."""
    program = textwrap.dedent(BUSY).format(time_limit=time_limit, five=box("5"), then=then)
    pipe = subprocess.PIPE
    process = subprocess.Popen(
        [sys.executable, "-c", program], stdin=pipe, stdout=pipe, stderr=pipe, text=True, process_group=0
    )
    assert process.stdout and process.stdout.readline() == "started\n"
    return process


HANG = f"pool.grade_all([({HOSTILE['power tower']!r}, '5')] * 2)"


def test_the_end_of_the_caller_is_the_end_of_the_workers() -> None:
    process = caller("input()")  # it does not close its pool
    workers = workers_of(process.pid)
    assert len(workers) == 2
    _, errors = process.communicate("\n", timeout=60)
    assert (process.returncode, errors) == (0, "")
    assert all(ended(worker) for worker in workers)


def test_an_interrupt_reaches_the_caller_and_ends_the_workers() -> None:
    process = caller(HANG)
    workers = workers_of(process.pid)
    time.sleep(0.3)
    os.killpg(process.pid, signal.SIGINT)  # as the terminal does
    _, errors = process.communicate(timeout=60)
    assert process.returncode != 0
    assert errors.count("KeyboardInterrupt") == 1  # and no traceback of a worker
    assert len(workers) == 2
    assert all(ended(worker) for worker in workers)


def test_an_interrupt_that_the_caller_ignores_loses_no_verdict() -> None:
    # parsing this sum takes seconds in Python code, which an interrupt would end
    long_sum = box("1+" * 900 + "1")
    process = caller(
        "import signal; signal.signal(signal.SIGINT, lambda *_: None); print('ignoring', flush=True); "
        f"print(pool.grade_all([({long_sum!r}, '901')])[0].rule)"
    )
    assert process.stdout and process.stdout.readline() == "ignoring\n"
    time.sleep(0.2)
    os.killpg(process.pid, signal.SIGINT)
    assert process.communicate(timeout=60) == ("boxed\n", "")


@pytest.mark.slow
def test_busy_workers_of_a_killed_caller_end_by_their_cpu_limit() -> None:
    process = caller(HANG, time_limit=1.0)
    workers = workers_of(process.pid)
    process.kill()
    process.communicate(timeout=60)
    assert len(workers) == 2
    wait_for("end of the workers", lambda: all(ended(worker) for worker in workers), 60)


def test_workers_do_not_load_the_torch_of_their_caller(tmp_path: Path) -> None:
    script = tmp_path / "caller.py"  # no `if __name__ == "__main__"`: multiprocessing would run it again
    script.write_text(
        "import torch, os\n"
        "from pathlib import Path\n"
        "from tip_exp.grading.pool import GradingPool\n"
        "with GradingPool(1) as pool:\n"
        f"    right = pool.grade_all([({box('5')!r}, '5')])[0].right\n"
        "    child = Path(f'/proc/self/task/{os.getpid()}/children').read_text().split()[-1]\n"
        "    print(right, *('torch' in Path(f'/proc/{pid}/maps').read_text() for pid in (child, os.getpid())))\n"
    )
    result = subprocess.run([sys.executable, str(script)], capture_output=True, text=True, timeout=120)
    assert (result.stdout, result.stderr) == ("True False True\n", "")
