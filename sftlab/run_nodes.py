"""A started run, node by node: its launchers, what rank 0 writes, a stop, and who failed.

python -c "from sftlab import run_nodes; help(run_nodes.run)"
"""

import contextlib
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

from sftlab import files, node_check, rank_logs


def run(commands: dict[int, tuple[str, list[str]]], each: int, log_dir: Path, environment: dict) -> int:
    """Start each node's command, show what its first rank writes, and wait; when one fails, end the others and say who began.

    commands: host and command by the node's rank; each: processes of a node. Ctrl-C asks the first process to stop, which
    tells all others, so that they save a checkpoint at the same step; a second one ends the launchers. Returns 0, 130 for a
    run that was stopped, or the exit code of the process that failed first.
    """
    log_dir.mkdir(parents=True, exist_ok=True)
    ranks = [node * each + rank for node in commands for rank in range(each)]
    rank_logs.forget(log_dir, None if 0 in commands else ranks)
    outputs = [(log_dir / f"launcher-{node}.log").open("wb") for node in commands]
    environment = os.environ | environment | {"PATH": f"{node_check.TOOLS}{os.pathsep}{os.environ.get('PATH', '')}"}
    # a session of its own, so that Ctrl-C comes here alone, and a whole launcher can be ended at once
    started = [subprocess.Popen(command, env=environment, stdin=subprocess.DEVNULL, stdout=output, stderr=output,
                                start_new_session=True) for (_, command), output in zip(commands.values(), outputs, strict=True)]  # fmt: skip
    killed, shown, asked = {}, 0, []

    def end_all() -> None:
        for process in started:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGTERM)

    def stop(number, frame) -> None:
        asked.append(number)
        if len(asked) > 1 or not ask_first(log_dir, ranks[0], commands[ranks[0] // each][0]):
            end_all()

    before = {number: signal.signal(number, stop) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        ended = False
        while True:
            codes = [process.poll() for process in started]
            for rank in rank_logs.find_killed(log_dir, ranks):
                killed.setdefault(rank, time.time())
            shown = show_more(log_dir / f"rank-{ranks[0]}.log", shown)
            if any(codes) and not ended:
                end_all()
                ended = True
            if None not in codes and not rank_logs.list_alive(log_dir, ranks):
                break
            time.sleep(0.2)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        for output in outputs:
            output.close()
    show_more(log_dir / f"rank-{ranks[0]}.log", shown)
    return tell_end(log_dir, ranks, any(codes), killed, bool(asked))


def ask_first(log_dir: Path, rank: int, host: str) -> bool:
    """Ask a process to save and stop, here or by ssh; whether it had begun."""
    about = files.read_json(log_dir / f"rank-{rank}.json")
    if "pid" not in about or "ended" in about:
        return False
    command = node_check.wrap(host, ["kill", "-TERM", str(about["pid"])], {})
    return subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True).returncode == 0


def show_more(log: Path, shown: int) -> int:
    """Copy to the screen what a log has grown by since `shown` bytes; return how many it has now."""
    if not log.is_file():
        return shown
    with log.open("rb") as file:
        file.seek(shown)
        text = file.read()
    sys.stdout.write(text.decode("utf-8", "replace"))
    sys.stdout.flush()
    return shown + len(text)


def tell_end(log_dir: Path, ranks: list[int], failed: bool, killed: dict[int, float], asked: bool) -> int:
    """Say how a run ended, and return its exit code.

    failed: whether a launcher did; killed: when ranks were found dead (seconds since the epoch); asked: whether it was told to stop.
    """
    if not failed:
        print(f"all processes have ended well; their logs: {log_dir}")
        return 0
    found = rank_logs.find_failed(log_dir, ranks, killed)
    if asked and (found is None or found.code == rank_logs.KILLED):
        print(f"sftlab: stopped; go on with --resume. Logs: {log_dir}", file=sys.stderr)
        return 130
    if found is None:
        lines, who, code = [], "a launcher failed before the processes began", 1
        for path in sorted(log_dir.glob("launcher-*.log")):
            lines += path.read_text(encoding="utf-8", errors="replace").splitlines()[-rank_logs.LAST_LINES :]
    else:
        lines, who, code = rank_logs.read_last(log_dir, found.rank), str(found), found.code
    last = f"Its last lines ({log_dir}):" if lines else f"It wrote nothing; the other logs: {log_dir}"
    print(f"\nsftlab: {who}; the others were ended. {last}", file=sys.stderr)
    print("\n".join(f"  {line}" for line in lines), file=sys.stderr)
    return code
