"""A run on Kubernetes: an Indexed Job, or a TrainJob of Kubeflow Trainer, written from the templates in jobs/.

Sources: the reference of batch/v1 Job (completionMode, podFailurePolicy), and of trainer.kubeflow.org/v1alpha1 as of
Kubeflow Trainer 2.2.
"""

from __future__ import annotations

import importlib.resources
import json
import posixpath
import re
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, Literal

import yaml

from facefast.cluster.words import read_train, split
from facefast.recipe import Recipe, is_remote
from facefast.recipe.options import parse
from facefast.recipe.ranges import MOST, require
from facefast.runtime import exits
from facefast.runtime.terminal import complain, say

CONTAINER = "node"
"""Kubeflow's name for the training container, and so ours."""
PORT = 29400
"""Where the first pod keeps the store; torchrun's own default."""
ARRIVAL = 600
"""Seconds that pods wait for each other: an image of several GB arrives at a new machine minutes later."""
USER = 1000
"""As in the Dockerfile."""
OWN = "own"
"""Stands for a TrainingRuntime that is written beside the TrainJob."""
NAME = re.compile(r"[a-z]([-a-z0-9]*[a-z0-9])?")
LONGEST_NAME = 52
"""Letters: a host name has 63, of which the number of a pod takes some."""
QUANTITY = re.compile(r"[0-9]+(\.[0-9]+)?(m|k|M|G|T|Ki|Mi|Gi|Ti)?")
VOLUME = re.compile(r"([a-z0-9][-.a-z0-9]*):(/[^:]*)(:ro)?")


@dataclass(frozen=True, kw_only=True)
class KubernetesArguments:
    """Options of `facefast submit kubernetes`; behind -- stand those of `facefast train`."""

    image: str
    """Container image with facefast in it (see Dockerfile), with its registry and tag or digest."""
    name: str = ""
    """Of the job; by default that of the run folder."""
    namespace: str = "default"
    """Where in the cluster."""
    nodes: int = 1
    """Machines, each with one pod."""
    gpus_per_node: int = 1
    """GPUs of each, one process a GPU; 0 is one process on the CPU."""
    cpus: int = 8
    """Cores of each, for decoding and, without a GPU, for everything."""
    memory: str = "32Gi"
    """Memory of each, /dev/shm included."""
    shm: str = "4Gi"
    """Size of /dev/shm, by which the processes of a node exchange gradients: a container has 64 MiB otherwise."""
    volumes: tuple[str, ...] = ()
    """CLAIM:FOLDER or CLAIM:FOLDER:ro of persistent volume claims: photographs read-only, run folders not."""
    kind: Literal["job", "trainjob"] = "job"
    """An Indexed Job, which every cluster has, or a TrainJob of Kubeflow Trainer 2.2."""
    runtime: str = OWN
    """A TrainJob's runtime: own is written beside it; a ClusterTrainingRuntime such as torch-distributed restarts pods
    by its own rules."""
    queue: str = ""
    """Local queue of Kueue, which then decides when the job starts."""
    suspend: bool = False
    """Hand the job in without starting it."""
    grace: int = 300
    """Seconds from SIGTERM to SIGKILL: longer than an evaluation and a checkpoint take together."""
    retries: int = 3
    """Failures that are tried again: storage, and what has no code. A stop (75) does not count."""
    deadline: int = 0
    """Seconds after which the job is ended however it goes; 0 is none."""
    go: bool = False
    """Hand it in with kubectl apply instead of printing it."""

    def __post_init__(self) -> None:
        require(
            self, nodes=(1, 10_000), gpus_per_node=(0, 64), cpus=(1, 1024), grace=(30, MOST), retries=(0, 1000),
            deadline=(0, MOST),
        )  # fmt: skip
        for field in ("memory", "shm"):
            if not QUANTITY.fullmatch(getattr(self, field)):
                raise ValueError(f"{field} is {getattr(self, field)!r}; it must be a quantity such as 32Gi")
        for field in ("name", "namespace", "queue"):
            value = getattr(self, field)
            if value and not (NAME.fullmatch(value) and len(value) <= LONGEST_NAME):
                raise ValueError(
                    f"{field} is {value!r}; it must be at most {LONGEST_NAME} of a-z, 0-9 and -, begin with a letter "
                    "and not end with -"
                )
        if not re.fullmatch(r"[\w./:@-]+", self.image):
            raise ValueError(f"image is {self.image!r}; it must name an image, as in registry.example.com/facefast:1.0")
        for volume in self.volumes:
            if not VOLUME.fullmatch(volume):
                raise ValueError(f"volumes has {volume!r}; each must be CLAIM:/FOLDER or CLAIM:/FOLDER:ro")
        folders = [VOLUME.fullmatch(volume)[2] for volume in self.volumes]  # type: ignore[index]
        if len(set(folders)) < len(folders):
            raise ValueError(f"volumes has a folder twice: {', '.join(folders)}")
        if self.runtime != OWN and self.kind != "trainjob":
            raise ValueError("runtime has no effect on a Job; leave it out, or add --kind trainjob")


def submit(arguments: list[str]) -> int:
    """Prints the manifests of a run, or hands them to kubectl; returns the exit code.

    Args:
        arguments: options, --, and the words of `facefast train`.

    Raises:
        ValueError: an option, a recipe, or a run that would be lost with its pod.
    """
    ours, train = split(arguments, "kubernetes")
    given = parse(KubernetesArguments, ours, "submit kubernetes")
    text = manifests(given, train)
    if given.runtime != OWN:
        complain(
            f"warning: the runtime {given.runtime} starts failed pods again whatever their exit code, and gives them "
            "30 s to save unless it says otherwise; --runtime own does by facefast's codes"
        )
    if not given.go:
        say(text.rstrip())
        return exits.EXIT_DONE
    return _apply(text)


def manifests(given: KubernetesArguments, train: list[str]) -> str:
    """YAML of everything that is to be handed in.

    Raises:
        ValueError: the words are none of `facefast train`, or what they name does not outlast a pod.
    """
    recipe, out, resume = read_train(train)
    _require_kept(given, recipe, out, resume)
    values = _values(given, train, given.name or _name_of(out))
    names = ["job"] if given.kind == "job" else ["runtime"] * (given.runtime == OWN) + ["trainjob"]
    return "".join(render(template(name), values) for name in names)


def _require_kept(given: KubernetesArguments, recipe: Recipe, out: Path, resume: str) -> None:
    """Refuses a run whose pods would find nothing to read, or leave nothing behind."""
    if resume == "never":
        raise ValueError("--resume never would begin anew each time a pod is started again; give another --out instead")
    for option, path, writes in (("--out", str(out), True), ("--data.root", recipe.data.root, False)):
        if path and not is_remote(path) and not any(_holds(volume, path, writes) for volume in given.volumes):
            raise ValueError(
                f"{option} is {path}, which lies on no volume{' that can be written' if writes else ''} and so not "
                f"outside the pod; add --volumes CLAIM:/FOLDER, and begin {option} with that folder"
            )


def _holds(volume: str, path: str, writes: bool) -> bool:
    found = VOLUME.fullmatch(volume)
    assert found
    return PurePosixPath(posixpath.normpath(path)).is_relative_to(found[2]) and not (writes and found[3])


def _name_of(out: Path) -> str:
    """A job's name from that of its run folder."""
    name = re.sub(r"[^a-z0-9]+", "-", out.name.lower()).strip("-")
    name = (name if NAME.fullmatch(name) else f"run-{name}")[:LONGEST_NAME].rstrip("-")
    return name


def rules() -> list[dict[str, Any]]:
    """What becomes of a pod by its exit code; the first rule that fits."""

    def ended(action: str, *codes: int) -> dict[str, Any]:
        what = {"containerName": CONTAINER, "operator": "In", "values": sorted(codes)}
        return {"action": action, "onExitCodes": what}

    return [
        # The same command would fail again.
        ended("FailJob", exits.EXIT_USAGE, exits.EXIT_DATA, exits.EXIT_NUMERICS),
        # A checkpoint is written: started again without counting, as is a pod that the cluster itself took away.
        ended("Ignore", exits.EXIT_PREEMPTED),
        {"action": "Ignore", "onPodConditions": [{"type": "DisruptionTarget", "status": "True"}]},
        # Somebody may make room meanwhile. All other codes count as well.
        ended("Count", exits.EXIT_STORAGE),
    ]


def _values(given: KubernetesArguments, train: list[str], name: str) -> dict[str, Any]:
    """What stands for each $NAME of the templates."""
    processes = max(1, given.gpus_per_node)
    mounts, volumes = [], []
    for number, volume in enumerate(given.volumes):
        claim, folder, read_only = VOLUME.fullmatch(volume).groups()  # type: ignore[union-attr]
        source = {"claimName": claim} | ({"readOnly": True} if read_only else {})
        volumes.append({"name": f"claim-{number}", "persistentVolumeClaim": source})
        mounts.append({"name": f"claim-{number}", "mountPath": folder} | ({"readOnly": True} if read_only else {}))
    for folder, medium in (("/dev/shm", {"medium": "Memory", "sizeLimit": given.shm}), ("/tmp", {})):
        volumes.append({"name": folder.rpartition("/")[2], "emptyDir": medium})
        mounts.append({"name": folder.rpartition("/")[2], "mountPath": folder})
    amounts: dict[str, Any] = {"cpu": given.cpus, "memory": given.memory}
    if given.gpus_per_node:
        amounts["nvidia.com/gpu"] = given.gpus_per_node
    variables = {
        # A container sees all cores of its machine, whatever its share of them.
        "OMP_NUM_THREADS": str(max(1, given.cpus // processes)),
        "HOME": "/tmp",  # the image itself cannot be written
        "USER": "facefast",  # libraries ask, and not every image knows the number
        "PYTHONUNBUFFERED": "1",
    }
    labels = {"app.kubernetes.io/name": "facefast", "app.kubernetes.io/instance": name}
    host = f"{name}-0.{name}"
    own = given.runtime == OWN
    return {
        "NAME": name,
        "NAMESPACE": given.namespace,
        "HOST": host,
        "PORT": PORT,
        "LABELS": labels | ({"kueue.x-k8s.io/queue-name": given.queue} if given.queue else {}),
        "POD_LABELS": labels,
        "NODES": given.nodes,
        "SUSPEND": given.suspend or bool(given.queue),  # Kueue starts what is suspended
        "RETRIES": given.retries,
        "RULES": rules(),
        "DEADLINE": {"activeDeadlineSeconds": given.deadline} if given.deadline else {},
        "GRACE": given.grace,
        "CONTAINER": CONTAINER,
        "IMAGE": given.image,
        "COMMAND": _command(given, train, host, processes),
        "ENV": [{"name": key, "value": value} for key, value in variables.items()],
        "RESOURCES": {"requests": amounts, "limits": amounts},
        "POD_SECURITY": {
            "runAsNonRoot": True,
            "runAsUser": USER,
            "runAsGroup": USER,
            "fsGroup": USER,
            "fsGroupChangePolicy": "OnRootMismatch",  # or each start looks at every photograph
            "seccompProfile": {"type": "RuntimeDefault"},
        },
        "CONTAINER_SECURITY": {
            "allowPrivilegeEscalation": False,
            "readOnlyRootFilesystem": True,
            "capabilities": {"drop": ["ALL"]},
        },
        "MOUNTS": mounts,
        "VOLUMES": volumes,
        "RUNTIME": f"{name}-runtime" if own else given.runtime,
        "RUNTIME_KIND": "TrainingRuntime" if own else "ClusterTrainingRuntime",
    }


def _command(given: KubernetesArguments, train: list[str], host: str, processes: int) -> list[str]:
    launch = ["python", "-m", "facefast.cluster.launch", f"--nproc-per-node={processes}"]
    if given.kind == "job":  # a TrainJob's operator says the rest by variables
        launch += [
            f"--nnodes={given.nodes}",
            "--rdzv-backend=c10d",
            f"--rdzv-endpoint={host}:{PORT}",
            f"--rdzv-id={host}",
            f"--rdzv-conf=join_timeout={ARRIVAL},read_timeout={ARRIVAL}",
        ]
    # Kubernetes would put variables in place of $(NAME) in a photograph's path.
    return [*launch, "--", *(word.replace("$(", "$$(") for word in train)]


def template(name: str) -> str:
    """A template of jobs/."""
    return (importlib.resources.files(__package__) / "jobs" / f"{name}.yaml").read_text()


class _Blocks(yaml.SafeDumper):  # type: ignore[misc]
    """YAML in full, in which whatever a reader of another version might take for a number or a switch is quoted."""

    def ignore_aliases(self, data: Any) -> bool:
        return True

    def increase_indent(self, flow: bool = False, indentless: bool = False) -> Any:
        return super().increase_indent(flow, False)


_Blocks.add_representer(
    str, lambda dumper, text: dumper.represent_scalar("tag:yaml.org,2002:str", text, style=None if _bare(text) else '"')
)


def _bare(text: str) -> bool:
    """Whether a text needs no quotes: it is a word to every reader of YAML, unlike no, 1e3 and 0x1f."""
    return bool(re.fullmatch(r"[A-Za-z/_][\w/.-]*", text)) and text.lower() not in (
        "y", "n", "yes", "no", "on", "off", "true", "false", "null",
    )  # fmt: skip


def render(text: str, values: dict[str, Any]) -> str:
    """A template with its values: $NAME within a line is a scalar or a list in one line, $NAME alone on a line a block
    in the line's place, which an empty one takes away."""

    def inline(found: re.Match[str]) -> str:
        value = values[found[1]]
        return value if isinstance(value, str) and _bare(value) else json.dumps(value)

    lines = []
    for line in text.splitlines():
        if alone := re.fullmatch(r"( *)\$([A-Z_]+)", line):
            value = values[alone[2]]
            block = yaml.dump(value, Dumper=_Blocks, sort_keys=False, width=MOST).splitlines() if value else []
            lines += [alone[1] + part for part in block]
        else:
            lines.append(re.sub(r"\$([A-Z_]+)", inline, line))
    return "\n".join(lines) + "\n"


def _apply(text: str) -> int:
    if shutil.which("kubectl") is None:
        raise ValueError("there is no kubectl on PATH; install it, or leave --go out and hand the YAML in yourself")
    done = subprocess.run(["kubectl", "apply", "-f", "-"], input=text, text=True, capture_output=True)
    if done.returncode:
        raise ValueError(f"kubectl apply ended with {done.returncode}: {done.stderr.strip() or done.stdout.strip()}")
    say(done.stdout.rstrip())
    return exits.EXIT_DONE
