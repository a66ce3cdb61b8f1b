"""Manifests are valid, mean what the exit codes mean, and start what `facefast train` takes."""

from __future__ import annotations

import os
import re
import shlex
from pathlib import Path
from typing import Any

import kubernetes_validate
import pytest
import yaml

from facefast import cli, submit
from facefast.cluster import kubernetes
from facefast.recipe import flags
from facefast.recipe.options import parse
from facefast.runtime import exits
from tests.cluster import trainjob_schema

ROOT = Path(__file__).parents[2]
VERSIONS = ("1.30.0", "1.31.0", "1.32.0", "1.33.0", "1.34.0", "1.35.0", "1.36.0")
VOLUMES = ("--volumes", "photos:/data:ro", "runs:/runs")
TRAIN = ("finetune", "--data.root", "/data/people", "--model.source", "/data/weights.pt", "--out", "/runs/mine")
VARIANTS = {
    "plain": (),
    "many": ("--nodes", "16", "--gpus-per-node", "8", "--cpus", "96", "--memory", "512Gi", "--shm", "16Gi"),
    "queued": ("--queue", "team-a", "--deadline", "86400", "--retries", "0", "--grace", "900"),
    "waiting": ("--suspend", "--namespace", "faces", "--name", "no"),
    "CPU": ("--gpus-per-node", "0", "--cpus", "2"),
}


def manifests(*words: str, train: tuple[str, ...] = TRAIN) -> list[dict[str, Any]]:
    """Each document that `facefast submit kubernetes` prints, read as YAML 1.1."""
    given = parse(kubernetes.KubernetesArguments, ["--image", "r.example/f:1", *words], "submit kubernetes")
    return list(yaml.safe_load_all(kubernetes.manifests(given, list(train))))


def found(documents: list[dict[str, Any]], kind: str) -> dict[str, Any]:
    return next(document for document in documents if document["kind"] == kind)


def job(*words: str, train: tuple[str, ...] = TRAIN) -> Any:
    return found(manifests(*VOLUMES, *words, train=train), "Job")["spec"]


def printed(words: list[str], capsys: pytest.CaptureFixture[str]) -> tuple[int, str, str]:
    code = cli.run(["submit", *words])
    out, err = capsys.readouterr()
    return code, out, err


@pytest.mark.parametrize(
    ("variant", "version"),
    [("many", version) for version in VERSIONS]
    + [(variant, VERSIONS[-1]) for variant in VARIANTS if variant != "many"],
)
def test_a_job_and_its_service_are_valid_for_every_kubernetes(variant: str, version: str) -> None:
    documents = manifests(*VOLUMES, *VARIANTS[variant])
    assert [document["kind"] for document in documents] == ["Service", "Job"]
    for document in documents:
        kubernetes_validate.validate(document, version, strict=True)


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_train_job_has_only_fields_of_its_schema(variant: str) -> None:
    documents = manifests("--kind", "trainjob", *VOLUMES, *VARIANTS[variant])
    assert [document["kind"] for document in documents] == ["TrainingRuntime", "TrainJob"]
    for document in documents:
        trainjob_schema.validate(document)
    runtime, train_job = documents
    assert train_job["spec"]["runtimeRef"]["name"] == runtime["metadata"]["name"]
    # Within the runtime stands a Job: its fields are Kubernetes' own.
    (part,) = runtime["spec"]["template"]["spec"]["replicatedJobs"]
    inner = {"apiVersion": "batch/v1", "kind": "Job", "metadata": {"name": "x"}, "spec": part["template"]["spec"]}
    kubernetes_validate.validate(inner, VERSIONS[-1], strict=True)


@pytest.mark.parametrize(
    ("place", "value"),
    [(("trainer", "numProcPerNode"), "auto"), (("trainer", "elasticPolicy"), {}), (("podTemplateOverrides",), [])],
)
def test_the_schema_finds_what_kubeflow_has_dropped(place: tuple[str, ...], value: Any) -> None:
    document = found(manifests("--kind", "trainjob", *VOLUMES), "TrainJob")
    inner = document["spec"]
    for part in place[:-1]:
        inner = inner[part]
    inner[place[-1]] = value
    with pytest.raises(trainjob_schema.Invalid, match=place[-1]):
        trainjob_schema.validate(document)


def test_an_existing_runtime_is_named_and_said_to_restart_by_rules_of_its_own(
    capsys: pytest.CaptureFixture[str],
) -> None:
    words = ["kubernetes", "--image", "r/f:1", *VOLUMES, "--kind", "trainjob", "--runtime", "torch-distributed"]
    code, out, err = printed([*words, "--", *TRAIN], capsys)
    assert code == 0
    (document,) = yaml.safe_load_all(out)
    trainjob_schema.validate(document)
    assert document["spec"]["runtimeRef"] == {
        "apiGroup": "trainer.kubeflow.org",
        "kind": "ClusterTrainingRuntime",
        "name": "torch-distributed",
    }
    assert err.startswith("warning: the runtime torch-distributed starts failed pods again whatever their exit code")


def actions(rules: list[dict[str, Any]]) -> dict[int, str]:
    """What becomes of a pod of each exit code; the first rule counts, and none means Count."""
    by_code = {}
    for code in range(1, 256):
        hit = [rule["action"] for rule in rules if code in rule.get("onExitCodes", {}).get("values", ())]
        by_code[code] = hit[0] if hit else "Count"
    return by_code


@pytest.mark.parametrize("kind", ["job", "trainjob"])
def test_exit_codes_decide_about_restarts_as_the_contract_has_them(kind: str) -> None:
    # Literal numbers: schedulers and people's scripts have them written down.
    documents = manifests("--kind", kind, *VOLUMES)
    if kind == "job":
        spec = found(documents, "Job")["spec"]
    else:
        (part,) = found(documents, "TrainingRuntime")["spec"]["template"]["spec"]["replicatedJobs"]
        spec = part["template"]["spec"]
    rules = spec["podFailurePolicy"]["rules"]
    expected = {code: "Count" for code in range(1, 256)} | {64: "FailJob", 65: "FailJob", 70: "FailJob", 75: "Ignore"}
    assert actions(rules) == expected
    assert {"action": "Count", "values": [74]} in [
        {"action": rule["action"], "values": rule["onExitCodes"]["values"]} for rule in rules if "onExitCodes" in rule
    ]
    assert {"type": "DisruptionTarget", "status": "True"} in [
        condition for rule in rules if rule["action"] == "Ignore" for condition in rule.get("onPodConditions", ())
    ]
    pod = spec["template"]["spec"]
    names = {container["name"] for container in pod["containers"]}
    assert {rule["onExitCodes"]["containerName"] for rule in rules if "onExitCodes" in rule} == names
    assert pod["restartPolicy"] == "Never"  # no other goes with a podFailurePolicy
    assert pod["terminationGracePeriodSeconds"] == 300
    assert spec["podReplacementPolicy"] == "Failed"


@pytest.mark.parametrize(("name", "number"), [("EXIT_PREEMPTED", 99), ("EXIT_DATA", 66), ("EXIT_STORAGE", 73)])
def test_the_rules_take_their_numbers_from_the_code(name: str, number: int, monkeypatch: pytest.MonkeyPatch) -> None:
    before = getattr(exits, name)
    monkeypatch.setattr(exits, name, number)
    named = [code for rule in kubernetes.rules() for code in rule.get("onExitCodes", {}).get("values", ())]
    assert number in named and before not in named


def test_pods_meet_at_the_first_by_its_name_in_the_headless_service() -> None:
    service, whole = manifests(*VOLUMES, "--nodes", "4", "--gpus-per-node", "2")
    name, spec = whole["metadata"]["name"], whole["spec"]
    assert (spec["completionMode"], spec["completions"], spec["parallelism"]) == ("Indexed", 4, 4)
    assert service["spec"]["clusterIP"] == "None" and service["spec"]["publishNotReadyAddresses"] is True
    assert service["spec"]["selector"] == {"batch.kubernetes.io/job-name": name}
    assert spec["template"]["spec"]["subdomain"] == service["metadata"]["name"] == name
    (container,) = spec["template"]["spec"]["containers"]
    words = container["command"]
    (port,) = [port["port"] for port in service["spec"]["ports"]]
    assert f"--rdzv-endpoint={name}-0.{name}:{port}" in words
    assert {"--nnodes=4", "--nproc-per-node=2", "--rdzv-backend=c10d"} <= set(words)
    assert words[:3] == ["python", "-m", "facefast.cluster.launch"]
    assert flags.train_arguments(words[words.index("--") + 1 :]) == flags.train_arguments(list(TRAIN))


def test_pods_own_nothing_but_what_is_mounted() -> None:
    pod = job("--shm", "2Gi")["template"]["spec"]
    (container,) = pod["containers"]
    assert pod["securityContext"]["runAsNonRoot"] and pod["securityContext"]["runAsUser"] > 0
    assert container["securityContext"] == {
        "allowPrivilegeEscalation": False,
        "readOnlyRootFilesystem": True,
        "capabilities": {"drop": ["ALL"]},
    }
    assert pod["automountServiceAccountToken"] is False
    mounts = {mount["mountPath"]: mount for mount in container["volumeMounts"]}
    volumes = {volume["name"]: volume for volume in pod["volumes"]}
    assert mounts.keys() == {"/data", "/runs", "/dev/shm", "/tmp"}
    assert mounts["/data"]["readOnly"] and "readOnly" not in mounts["/runs"]
    assert volumes[mounts["/data"]["name"]]["persistentVolumeClaim"] == {"claimName": "photos", "readOnly": True}
    assert volumes[mounts["/dev/shm"]["name"]]["emptyDir"] == {"medium": "Memory", "sizeLimit": "2Gi"}
    resources = container["resources"]
    assert resources["limits"] == resources["requests"]
    assert resources["limits"] == {"cpu": 8, "memory": "32Gi", "nvidia.com/gpu": 1}


def test_threads_are_those_of_the_pod_and_not_of_its_machine() -> None:
    (container,) = job("--cpus", "96", "--gpus-per-node", "8")["template"]["spec"]["containers"]
    assert {"name": "OMP_NUM_THREADS", "value": "12"} in container["env"]
    assert "nvidia.com/gpu" not in str(job("--gpus-per-node", "0"))


def test_kueue_starts_what_is_queued_and_nobody_what_is_suspended() -> None:
    queued = found(manifests(*VOLUMES, "--queue", "team-a"), "Job")
    assert queued["metadata"]["labels"]["kueue.x-k8s.io/queue-name"] == "team-a"
    assert queued["spec"]["suspend"] is True
    assert job("--suspend")["suspend"] is True and job()["suspend"] is False


@pytest.mark.parametrize("name", ["1e3", "No", "\u00c4_b", "x" * 90])
def test_a_run_folder_of_any_name_gives_a_valid_one_that_stays_a_text(name: str) -> None:
    train = (*TRAIN[:-1], f"/runs/{name}")
    for document in manifests(*VOLUMES, train=train):
        kubernetes_validate.validate(document, VERSIONS[-1], strict=True)
        assert kubernetes.NAME.fullmatch(document["metadata"]["name"])
        assert len(document["metadata"]["name"]) <= kubernetes.LONGEST_NAME


@pytest.mark.parametrize(
    "text", ["1e3", "0o17", "0x1f", "no", "Off", "y", "null", "~", "12:30", "1_000", "", "- a", "a: b"]
)
def test_a_text_is_a_text_in_every_version_of_yaml(text: str) -> None:
    shown = kubernetes.render("  $WORD\na: $LINE", {"WORD": {"a": text}, "LINE": text})
    assert shown.count('"') == 4
    assert [list(yaml.safe_load(line).values()) for line in shown.splitlines()] == [[text], [text]]


def test_words_that_yaml_and_kubernetes_would_change_arrive_as_they_were_typed() -> None:
    odd = "/data/$(HOME) \"a\": 'b' #c $NAME \u00e9"
    (container,) = job(train=(*TRAIN, "--data.root", odd))["template"]["spec"]["containers"]
    assert container["command"][-1] == odd.replace("$(", "$$(")  # $$( is $( to Kubernetes


def test_photographs_of_an_object_store_need_no_volume() -> None:
    train = ("finetune", "--data.root", "s3://bucket/people", "--model.source", "/w", "--out", "/runs/mine")
    (container,) = job(train=train)["template"]["spec"]["containers"]
    assert container["command"][-5:-3] == ["s3://bucket/people", "--model.source"]


@pytest.mark.parametrize(
    ("ours", "train", "said"),
    [
        ((), (*TRAIN, "--help-all"), "facefast train --help tells of the words behind --"),
        ((), (*TRAIN, "--epcohs", "3"), "there is no option --epcohs"),
        ((), ("finetnue", *TRAIN[1:]), "there is no recipe 'finetnue'; did you mean finetune?"),
        ((), (*TRAIN, "--phases.0.lr", "fast"), "lr"),
        (
            (),
            ("finetune", "--data.root", "/data/x", "--model.source", "/w"),
            "--out is runs/finetune, which lies on no",
        ),
        ((), (*TRAIN[:-1], "/data/run"), "--out is /data/run, which lies on no volume that can be written"),
        ((), (*TRAIN[:-1], "/runs/../tmp/run"), "which lies on no volume that can be written"),
        ((), (*TRAIN, "--data.root", "/elsewhere"), "--data.root is /elsewhere, which lies on no volume and so"),
        ((), (*TRAIN, "--resume", "never"), "--resume never would begin anew each time"),
        ((), (*TRAIN, "--help"), "facefast train --help"),
        (("--nodes", "0"), TRAIN, "nodes is 0; it must lie in [1, 10000]"),
        (("--grace", "5"), TRAIN, "grace is 5; it must lie in [30, "),
        (("--memory", "lots"), TRAIN, "memory is 'lots'; it must be a quantity such as 32Gi"),
        (("--name", "My Job"), TRAIN, "name is 'My Job'; it must be at most 52 of a-z"),
        (("--volumes", "photos"), TRAIN, "volumes has 'photos'; each must be CLAIM:/FOLDER"),
        (("--volumes", "a:/x", "b:/x"), TRAIN, "volumes has a folder twice: /x, /x"),
        (("--runtime", "torch-distributed"), TRAIN, "runtime has no effect on a Job"),
        (("--kind", "pytorchjob"), TRAIN, "pytorchjob"),
        (("--gpu", "4"), TRAIN, "there is no option --gpu"),
        (("--image", "no image\n"), TRAIN, "image is 'no image\\n'; it must name an image"),
    ],
    ids=lambda value: " ".join(value)[-40:] if isinstance(value, tuple) else "",
)
def test_what_cannot_run_is_refused_before_it_is_handed_in(
    ours: tuple[str, ...], train: tuple[str, ...], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    code, out, err = printed(["kubernetes", "--image", "r/f:1", *VOLUMES, *ours, "--", *train], capsys)
    assert (code, out) == (64, "")
    assert said in " ".join(err.split())


def test_words_without_their_dashes_are_told_where_they_belong(capsys: pytest.CaptureFixture[str]) -> None:
    code, _, err = printed(["kubernetes", "--image", "r/f:1", *TRAIN], capsys)
    assert code == 64 and "behind a -- of their own" in err


def fake_kubectl(folder: Path, code: int) -> None:
    folder.mkdir()
    script = folder / "kubectl"
    script.write_text(
        f'#!/bin/sh\necho "$@" > {folder}/words\ncat > {folder}/given\necho said; echo wrong >&2\nexit {code}\n'
    )
    script.chmod(0o755)


@pytest.mark.parametrize("code", [0, 1])
def test_go_hands_the_printed_manifests_to_kubectl(
    code: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    fake_kubectl(tmp_path / "bin", code)
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:{os.environ['PATH']}")
    words = ["kubernetes", "--image", "r/f:1", *VOLUMES]
    shown = printed([*words, "--", *TRAIN], capsys)[1]
    assert not (tmp_path / "bin" / "given").exists()
    ended, out, err = printed([*words, "--go", "--", *TRAIN], capsys)
    assert (tmp_path / "bin" / "given").read_text().strip() == shown.strip()
    assert shlex.split((tmp_path / "bin" / "words").read_text()) == ["apply", "-f", "-"]
    if code == 0:
        assert (ended, out, err) == (0, "said\n", "")
    else:
        assert (ended, out, err) == (64, "", "error: kubectl apply ended with 1: wrong\n")


def test_without_kubectl_nothing_is_handed_in(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    code, out, err = printed(["kubernetes", "--image", "r/f:1", *VOLUMES, "--go", "--", *TRAIN], capsys)
    assert (code, out) == (64, "") and "there is no kubectl on PATH" in err


def test_every_name_in_a_template_has_a_value_and_every_value_a_place() -> None:
    given = kubernetes.KubernetesArguments(image="r/f:1", volumes=VOLUMES[1:], deadline=5)
    values = kubernetes._values(given, list(TRAIN), "mine")
    used = set()
    for name in ("job", "runtime", "trainjob"):
        text = kubernetes.template(name)
        assert all(line == "---" or line[:1].isalpha() or line[:1] in " #" for line in text.splitlines())
        used |= set(re.findall(r"\$([A-Z_]+)", text))
    assert used == set(values)


def test_submit_names_its_schedulers(capsys: pytest.CaptureFixture[str]) -> None:
    assert printed(["slum"], capsys)[0] == 64
    for scheduler in submit.SCHEDULERS:
        code, out, _ = printed([scheduler, "--help"], capsys)
        assert code == 0 and f"facefast.submit {scheduler}" in out
