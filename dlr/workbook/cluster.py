"""Points of a sweep as jobs of a cluster: submitted through submitit, found again by job.json.

The scheduler owns a point while its job is queued or runs. What a job found is read from the
point's folder alone; submitit's own files are logs.
"""

import contextlib
import json
import os
import platform
import re
import shlex
import shutil
import subprocess
import time
from pathlib import Path

import psutil

from dlr.runs import Run, project_root, results_folder, write_atomically
from dlr.settings import SettingsError
from dlr.workbook.places import SCRATCH

JOB = "job.json"
SUBMITTING = 600             # seconds that a point without a job's number counts as being submitted
TIMEOUTS = 20                # times that a point which ran out of time is queued again
WEEK = 7 * 24 * 60           # minutes
# What submitit calls alike on every cluster; the names of the others begin with the cluster's.
_SHARED = ("name", "timeout_min", "mem_gb", "cpus_per_task", "gpus_per_node")
_SBATCH = {"timeout_min": "time", "name": "job-name"}


# -- which job a point has -----------------------------------------------------------------------
def job_of(folder: Path) -> dict | None:
    """What job.json says: cluster, job (its number, '' before it has one), log and the like."""
    try:
        return json.loads((folder / JOB).read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except ValueError:                     # another process is writing it
        return {"cluster": "", "job": "", "time": time.time()}


def living(jobs: dict[str, dict]) -> dict[str, str]:
    """Name to state ('running', 'pending', ...) of those of `jobs` that have not ended.

    Raises:
        SettingsError: Slurm does not answer. Its silence does not mean that a job has ended.
    """
    queue = _slurm_queue() if any(job["cluster"] == "slurm" for job in jobs.values()) else {}
    states = {name: _state(job, queue) for name, job in jobs.items()}
    return {name: state for name, state in states.items() if state}


def _slurm_queue() -> dict[str, str]:
    command = ["squeue", "--me", "--array", "--noheader", "--format=%i %T"]
    try:
        answer = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError) as error:
        reason = getattr(error, "stderr", None) or error
        raise SettingsError("Points of this sweep were given to Slurm, and squeue does not say "
                            f"here how they are ({str(reason).strip()}). Call this where Slurm's "
                            "commands work.") from None
    return {line.split()[0]: line.split()[1].lower() for line in answer.splitlines()}


def _state(job: dict, queue: dict[str, str]) -> str | None:
    if not job["job"]:
        return "being submitted" if time.time() - job["time"] < SUBMITTING else None
    if job["cluster"] == "slurm":
        return queue.get(job["job"])
    if job["host"] != platform.node():
        return f"running or ended on {job['host']}, which alone knows"
    with contextlib.suppress(psutil.NoSuchProcess):
        process = psutil.Process(int(job["job"]))
        is_it = abs(process.create_time() - job["time"]) < 1         # numbers are used again
        return "running" if is_it and process.status() != psutil.STATUS_ZOMBIE else None


def _claimed(folder: Path, ended: dict | None) -> bool:
    """Whether this submission has the point: of two at once, one makes job.json."""
    folder.mkdir(parents=True, exist_ok=True)
    if ended is not None and job_of(folder) == ended:
        (folder / JOB).unlink(missing_ok=True)
    try:
        with (folder / JOB).open("x", encoding="utf-8") as file:
            json.dump({"cluster": "", "job": "", "time": time.time()}, file)
    except FileExistsError:
        return False
    return True


def claim_for_this_job(folder: Path) -> None:
    """Writes job.json where Slurm runs this process as a task of an array.

    Raises:
        SettingsError: another job has the point, and is queued or runs.
    """
    array, task = (os.environ.get(f"SLURM_ARRAY_{name}_ID") for name in ("JOB", "TASK"))
    job = job_of(folder)
    if array is None or job is not None and job["job"] == f"{array}_{task}":   # queued again
        return
    if job is not None and living({"": job}) or not _claimed(folder, job):
        number = job["job"] if job else "it is being submitted"
        raise SettingsError(f"{folder.name} is the point of another job ({number}); scancel that, "
                            "or wait for it.")
    record = {"cluster": "slurm", "job": f"{array}_{task}", "host": platform.node(),
              "time": time.time(), "log": f"slurm-{array}_{task}.out"}
    write_atomically(folder / JOB, json.dumps(record) + "\n")


# -- submission ----------------------------------------------------------------------------------
def options_of(texts: list[str]) -> dict:
    """{'partition': 'gpu', 'timeout_min': 480} of ['partition=gpu,timeout_min=480'].

    Raises:
        SettingsError: one is no name=value, or would run a point more than once.
    """
    options = {}
    for text in texts:
        for part in re.split(r",(?=\w+=)", text):
            name, separator, value = part.partition("=")
            if not separator or not name:
                raise SettingsError(f"--slurm {text!r} must read name=value,name=value, for "
                                    "example --slurm partition=gpu,gpus_per_node=1,timeout_min=480")
            options[name] = int(value) if value.isdecimal() else True if value == "true" else value
    twice = [name for name in ("nodes", "tasks_per_node", "ntasks_per_node")
             if options.get(name, 1) != 1]
    if twice:
        raise SettingsError(f"--slurm {twice[0]}={options[twice[0]]}: a point is one task on one "
                            "machine, and would be run by each; leave it out.")
    return options


def _executor(cluster: str, options: dict):
    try:
        import submitit
    except ImportError:
        raise SettingsError("--cluster needs submitit: python -m pip install submitit") from None
    if cluster == "slurm" and shutil.which("srun") is None:
        raise SettingsError("There is no Slurm here (no srun). Submit from a login node; where "
                            "that has no Python, --print-array prints what to give to sbatch.")
    if cluster == "slurm" and not {"timeout_min", "time"} & options.keys():
        raise SettingsError("A job without a time limit gets 5 minutes: give one, for example "
                            "--slurm timeout_min=480")
    executor = submitit.AutoExecutor(results_folder() / SCRATCH / "jobs" / "%j", cluster=cluster,
                                     **{f"{cluster}_max_num_timeout": TIMEOUTS})
    given = {name if name in _SHARED else f"slurm_{name}": value for name, value in options.items()}
    try:
        executor.update_parameters(**given if cluster == "slurm" else {"timeout_min": WEEK})
    except (AssertionError, NameError, TypeError, ValueError) as error:
        raise SettingsError(f"--slurm: {str(error).splitlines()[0]}") from None
    return executor


def submit(phase: str, points: list[tuple[str, dict]], ended: dict[str, dict], cluster: str,
           options: dict, environments: list[dict], force: bool = False) -> dict[str, str]:
    """Name to job of those of `points` that this call gave to the cluster, one task a point.

    Args:
        ended: jobs of points that were submitted before and came to nothing.
        environments: variables of each point's own.
        force: what the points' folders hold is removed first, once: a point may begin twice.

    Raises:
        SettingsError: there is no such cluster, or it takes no such options.
    """
    executor = _executor(cluster, options)
    from submitit.helpers import environment_variables

    from dlr.workbook.cluster_point import Point
    home = results_folder() / phase
    mine = [(name, parameters, environment) for (name, parameters), environment
            in zip(points, environments) if _claimed(home / name, ended.get(name))]
    if not mine:
        return {}
    names = [name for name, *_ in mine]
    try:
        for name in names * force:
            Run(home / name).clear()
        paths = filter(None, [str(project_root()), os.environ.get("PYTHONPATH")])
        with environment_variables(PYTHONPATH=os.pathsep.join(paths)):
            jobs = executor.map_array(Point(), [phase] * len(mine), *map(list, zip(*mine)))
    except BaseException:
        for name in names:
            (home / name / JOB).unlink(missing_ok=True)
        raise
    for name, job in zip(names, jobs):
        is_here = cluster == "local"
        started = psutil.Process(int(job.job_id)).create_time() if is_here else time.time()
        record = {"cluster": cluster, "job": job.job_id, "host": platform.node(), "time": started,
                  "log": str(job.paths.stderr)}
        write_atomically(home / name / JOB, json.dumps(record) + "\n")
    return {name: job.job_id for name, job in zip(names, jobs)}


def array_script(command: list[str], count: int, options: dict) -> str:
    """What sbatch takes: an array whose task N runs `command --point N`."""
    flags = {"array": f"0-{count - 1}"}
    for name, value in options.items():
        flags["mem" if name == "mem_gb" else _SBATCH.get(name, name.replace("_", "-"))] = (
            f"{value}G" if name == "mem_gb" else value)
    lines = [f"#SBATCH --{name}" + ("" if value is True else f"={value}")
             for name, value in flags.items()]
    return "\n".join([
        "#!/bin/bash", *lines, "#SBATCH --requeue", "#SBATCH --open-mode=append",
        "#SBATCH --signal=B:USR2@90",
        "# sbatch THIS, from the project's folder, where `python` has its requirements.",
        "# Stopped or out of time, a point is queued again and goes on from its last checkpoint.",
        "trap 'scontrol requeue \"${SLURM_ARRAY_JOB_ID}_${SLURM_ARRAY_TASK_ID}\"' USR2",
        f"{shlex.join(command)} --point \"$SLURM_ARRAY_TASK_ID\" &", "wait $!"])
