"""SLURM's commands for tests: `sbatch` runs a job in the background, `sacct` reports it, `scancel` ends it.

`jobs/ID.json` in the folder $FAKE_SLURM has the arguments, the state and the number of starts of each job. A job whose
comment is in the file `preempt` is preempted once, two seconds after its start.
"""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

COMMANDS = ("sbatch", "srun", "sacct", "squeue", "scancel", "sinfo", "sshare", "sacctmgr")


def install(folder: Path) -> dict[str, str]:
    """Writes the commands into a folder, and returns the environment variables that select them."""
    (folder / "bin").mkdir(parents=True)
    (folder / "jobs").mkdir()
    for command in COMMANDS:
        path = folder / "bin" / command
        path.write_text(f'#!/bin/sh\nexec {sys.executable} {__file__} {command} "$@"\n')
        path.chmod(0o755)
    return {"PATH": f"{folder / 'bin'}:{os.environ['PATH']}", "FAKE_SLURM": str(folder), "USER": "tester"}


def read_jobs(folder: Path) -> list[dict[str, object]]:
    return [json.loads(path.read_text()) for path in sorted((folder / "jobs").glob("*.json"))]


def update(path: Path, **values: object) -> None:
    job = json.loads(path.read_text()) if path.exists() else {}
    path.with_suffix(".tmp").write_text(json.dumps(job | values))
    path.with_suffix(".tmp").replace(path)


def submit(folder: Path, args: list[str]) -> None:
    number = str(1000 + len(list((folder / "jobs").glob("*.json"))))
    path = folder / "jobs" / f"{number}.json"
    update(path, id=number, args=args, state="PENDING", starts=0)
    subprocess.Popen(
        [sys.executable, __file__, "run", str(path)],
        start_new_session=True, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    print(number)


def run(folder: Path, path: Path) -> None:
    args = json.loads(path.read_text())["args"]
    value = {option: args[args.index(option) + 1] for option in ("-D", "--output", "--comment")}
    (wrapped,) = (arg.removeprefix("--wrap=") for arg in args if arg.startswith("--wrap="))
    preempt = folder / "preempt"
    for start in (1, 2):
        with open(value["--output"].replace("%j", path.stem), "ab") as output:
            process = subprocess.Popen(
                wrapped, shell=True, cwd=value["-D"], stdout=output, stderr=output, start_new_session=True,
                env={**os.environ, "SLURM_JOB_ID": path.stem},
            )  # fmt: skip
        update(path, state="RUNNING", starts=start, pid=process.pid)
        if start == 1 and preempt.exists() and value["--comment"] in preempt.read_text().split():
            time.sleep(2)
            os.killpg(process.pid, signal.SIGTERM)
            process.wait()
            update(path, state="PREEMPTED")
            if "--requeue" in args:
                continue
            return
        status = process.wait()
        if json.loads(path.read_text())["state"] != "CANCELLED":
            update(path, state="COMPLETED" if status == 0 else "FAILED")
        return


def cancel(folder: Path, ids: list[str]) -> None:
    for number in ids:
        path = folder / "jobs" / f"{number}.json"
        if path.exists() and json.loads(path.read_text())["state"] == "RUNNING":
            update(path, state="CANCELLED")
            os.killpg(json.loads(path.read_text())["pid"], signal.SIGTERM)


def main(command: str, args: list[str]) -> None:
    folder = Path(os.environ["FAKE_SLURM"])
    if command == "sbatch":
        submit(folder, args)
    elif command == "run":
        run(folder, Path(args[0]))
    elif command == "srun":
        words = args[next(n for n, arg in enumerate(args) if not arg.startswith("-")) :]
        os.execvp(words[0], words)
    elif command == "sacct" and any("JobIdRaw" in arg for arg in args):
        print("\n".join(f"{job['id']}|{job['state']}" for job in read_jobs(folder)))
    elif command == "scancel":
        cancel(folder, [arg for arg in args if arg.isdigit()])
    elif command == "sinfo":
        print("PARTITION\nmain*")


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2:])
