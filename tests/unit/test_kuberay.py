"""The manifests in cluster/kuberay are ones that Kubernetes, KubeRay and Kueue take, with room for what their configs ask."""

import re
import shutil
import sys
from types import SimpleNamespace

import pytest
import yaml
from jsonschema import ValidationError

from tests.kuberay import (
    CRDS,
    HOUSE,
    KUBERAY,
    check,
    cluster_of,
    complaints,
    container,
    environment,
    gpus,
    groups_of,
    kustomize,
    pods_of,
    ray_manifest,
    schema_of,
    the,
)
from tpaw_ray.config import load_config
from tpaw_ray.placement import demands

PLACES = ["base", "interactive", "overlays/small-gpu", "overlays/two-pools", "overlays/spot", "overlays/kueue"]
with_schema = pytest.mark.skipif(
    not CRDS.exists(), reason="KubeRay's schema does not lie beside the repository (shared/data/kuberay-crds)"
)
everywhere = pytest.mark.parametrize("place", PLACES)


@with_schema
@everywhere
def test_every_field_is_one_of_kuberays_schema(place):
    manifest = ray_manifest(place)
    check(manifest, schema_of(manifest["kind"]))


@with_schema
@pytest.mark.parametrize(
    "path, value",
    [
        ("spec.backofLimit", 3),
        ("spec.rayClusterSpec.autoscalerOptions.version", "v3"),
        ("spec.rayClusterSpec.headGroupSpec.template.spec.volume", []),
        ("spec.rayClusterSpec.headGroupSpec.template.spec.volumes", [{"name": "twice"}, {"name": "twice"}]),
        ("spec.rayClusterSpec.workerGroupSpecs.0.minReplicas", "1"),
        ("spec.rayClusterSpec.workerGroupSpecs.0.template.spec.containers.0.securityContext.root", False),
    ],
)
def test_a_wrong_field_is_noticed(path, value):
    manifest = ray_manifest("base")
    put(manifest, path, value)
    with pytest.raises(ValidationError):
        check(manifest, schema_of("RayJob"))


@with_schema
@pytest.mark.parametrize("place", ["base", "overlays/small-gpu"])
def test_network_policy_and_claim_are_of_the_form_that_kuberays_schema_has_for_them(place):
    cluster = schema_of("RayCluster")["properties"]["spec"]["properties"]
    rules = cluster["networkPolicy"]["properties"]["head"]["properties"]["ingressRules"]
    check(the("NetworkPolicy", place)["spec"]["ingress"], rules)
    if place != "base":
        volumes = cluster["headGroupSpec"]["properties"]["template"]["properties"]["spec"]["properties"]["volumes"]
        claims = volumes["items"]["properties"]["ephemeral"]["properties"]["volumeClaimTemplate"]["properties"]["spec"]
        check(the("PersistentVolumeClaim", place)["spec"], claims)


@everywhere
def test_the_clusters_ray_is_the_projects(place):
    (version,) = re.findall(r'"ray\[.*\]==([\d.]+)"', (HOUSE / "pyproject.toml").read_text())
    assert cluster_of(ray_manifest(place))["rayVersion"] == version


@everywhere
def test_the_controllers_have_no_complaint(place):
    assert not list(complaints(ray_manifest(place)))


CLUSTER = "spec.rayClusterSpec"
HEAD, OPPONENT = f"{CLUSTER}.headGroupSpec", f"{CLUSTER}.workerGroupSpecs.1"


@pytest.mark.parametrize(
    "complaint, changes",
    [
        ("name Tpaw", {"metadata.name": "Tpaw"}),
        (f"name {'t' * 48}", {"metadata.name": "t" * 48}),
        ("suspend", {"spec.suspend": True, "spec.shutdownAfterJobFinishes": False, "spec.ttlSecondsAfterFinished": 0}),
        ("ttlSecondsAfterFinished", {"spec.shutdownAfterJobFinishes": False}),
        ("backoffLimit", {"spec.submissionMode": "InteractiveMode"}),
        ("backoffLimit", {"spec.backoffLimit": -1}),
        ("a submitter in SidecarMode", {"spec.submissionMode": "SidecarMode"}),
        ("deletionRules", {"spec.deletionStrategy": {"deletionRules": [{}]}}),
        ("preRunningDeadlineSeconds", {"spec.preRunningDeadlineSeconds": 0}),
        ("enableK8sTokenAuth", {f"{CLUSTER}.authOptions.enableK8sTokenAuth": True}),
        ("authOptions: rayVersion", {f"{CLUSTER}.rayVersion": "2.51.0"}),
        ("feature gates that are off by default", {f"{CLUSTER}.networkPolicy": {}}),
        ("resources twice", {f"{HEAD}.resources": {"CPU": "0"}}),
        ("labels in rayStartParams", {f"{OPPONENT}.rayStartParams": {"labels": "a=b"}}),
        ("label tpaw-role: an opponent", {f"{OPPONENT}.labels.tpaw-role": "an opponent"}),
        ("restartPolicy", {f"{OPPONENT}.template.spec.restartPolicy": "Always"}),
        ("replicas of opponent", {f"{OPPONENT}.replicas": 3}),
        ("replicas of opponent", {f"{OPPONENT}.minReplicas": 3}),
        ("idleTimeoutSeconds", {f"{CLUSTER}.autoscalerOptions.version": "v1"}),
        ("nothing scales opponent", {f"{CLUSTER}.enableInTreeAutoscaling": False}),
        ("Kueue: enableInTreeAutoscaling", {"metadata.labels": {"kueue.x-k8s.io/queue-name": "tpaw"}}),
    ],
)
def test_what_the_controllers_refuse_is_noticed(complaint, changes):
    manifest = ray_manifest("base")
    for path, value in changes.items():
        put(manifest, path, value)
    assert list(complaints(manifest)) == [complaint]


def put(manifest, path, value):
    *way, last = path.split(".")
    for step in way:
        manifest = manifest[int(step) if isinstance(manifest, list) else step]
    manifest[last] = value


# What the pods may do, and what they hold.


@everywhere
def test_no_pod_has_rights_that_the_restricted_standard_withholds(place):
    manifest = ray_manifest(place)
    containers = [cluster_of(manifest)["autoscalerOptions"]] if "autoscalerOptions" in cluster_of(manifest) else []
    for name, pod in pods_of(manifest).items():
        user = pod["spec"]["securityContext"]
        assert user["runAsNonRoot"] and user["runAsUser"] == 1000 and user["seccompProfile"] == {"type": "RuntimeDefault"}
        assert name == "head" or pod["spec"]["automountServiceAccountToken"] is False  # the head's autoscaler asks the API server
        assert not {"hostNetwork", "hostPID", "hostIPC"} & pod["spec"].keys()
        assert not any("hostPath" in volume for volume in pod["spec"].get("volumes", []))
        containers += pod["spec"]["containers"]
    for one in containers:
        assert one["securityContext"] == {"allowPrivilegeEscalation": False, "capabilities": {"drop": ["ALL"]}}
        assert one["resources"]["requests"] == one["resources"]["limits"]
        assert {"cpu", "memory"} <= one["resources"]["limits"].keys()
        assert not any(field.endswith("Probe") for field in one)


@everywhere
def test_secrets_are_referred_to_and_all_nodes_have_the_same(place):
    manifest = ray_manifest(place)
    groups = [container(group) for group in groups_of(manifest).values()]
    assert groups[0]["envFrom"] == groups[1]["envFrom"] == groups[2]["envFrom"]
    needed = [source["secretRef"]["name"] for source in groups[0]["envFrom"] if not source["secretRef"].get("optional")]
    in_store = load(place)["run"]["root"].startswith("s3://")
    assert needed == (["tpaw-store"] if in_store else [])
    claims = [any(mount["mountPath"] == "/storage" for mount in group["volumeMounts"]) for group in groups]
    assert claims == [not in_store] * 3
    for name in {name for group in groups for name in environment(group)}:
        assert not re.search("KEY|TOKEN|SECRET|PASSWORD", name)


@everywhere
def test_the_network_policy_selects_every_pod_and_lets_in_its_fellows_and_the_operator(place):
    policy = the("NetworkPolicy", place)["spec"]
    labels = policy["podSelector"]["matchLabels"]
    for pod in pods_of(ray_manifest(place)).values():
        assert labels.items() <= pod["metadata"]["labels"].items()
    fellows, operator, prometheus = policy["ingress"]
    assert fellows == {"from": [{"podSelector": {"matchLabels": labels}}]}
    (peer,) = operator["from"]  # in whichever namespace; the label is that of KubeRay's Helm chart and of its manifests
    assert peer == {"namespaceSelector": {}, "podSelector": {"matchLabels": {"app.kubernetes.io/component": "kuberay-operator"}}}
    assert [port["port"] for rule in (operator, prometheus) for port in rule["ports"]] == [8265, 8080]
    assert policy["policyTypes"] == ["Ingress"]


# The config of the run, and whether the pools have room for it.


def load(place):
    """The config as it stands in the ConfigMap, where the entry point names it."""
    texts = the("ConfigMap", place)["data"]
    if place != "interactive":
        manifest = the("RayJob", place)
        head = groups_of(manifest)["head"]
        (mount,) = [mount for mount in container(head)["volumeMounts"] if mount["name"] == "config"]
        (volume,) = [volume for volume in head["template"]["spec"]["volumes"] if volume["name"] == "config"]
        assert volume["configMap"]["name"] == the("ConfigMap", place)["metadata"]["name"]
        assert manifest["spec"]["entrypoint"] == f"tpaw run {mount['mountPath']}/{next(iter(texts))}"
    (text,) = texts.values()
    return yaml.safe_load(text)


@everywhere
def test_the_config_is_one_that_the_command_takes_and_the_pools_hold_what_it_asks_for(place, tmp_path):
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(load(place)))
    config = load_config(tmp_path / "run.yaml")
    groups = {name: group for name, group in groups_of(ray_manifest(place)).items() if name != "head"}
    asked = dict.fromkeys(groups, 0.0)
    for wanted in demands(config):
        if wanted.gpus:
            (pool,) = [name for name, group in groups.items() if wanted.labels.items() <= group["labels"].items()]
            asked[pool] += wanted.number * wanted.gpus
            assert wanted.labels and wanted.gpus <= gpus(groups[pool])
    assert asked == {name: group["maxReplicas"] * gpus(group) for name, group in groups.items()}  # none is missing, none idles


@everywhere
def test_rays_autoscaler_reads_labels_and_resources_from_the_manifest(place):
    from ray.autoscaler._private.kuberay.autoscaling_config import _derive_autoscaling_config_from_ray_cr

    manifest = ray_manifest(place)
    metadata = {"name": "tpaw", "namespace": "default"}
    types = _derive_autoscaling_config_from_ray_cr({"metadata": metadata, "spec": cluster_of(manifest)})["available_node_types"]
    head = types.pop("headgroup")
    assert head["resources"]["CPU"] == 0 and "GPU" not in head["resources"]  # no work on the head
    assert types.keys() == {"learner", "opponent"}
    for name, node in types.items():
        group = groups_of(manifest)[name]
        assert node["labels"] == group["labels"] and node["labels"]["tpaw-role"] == name
        assert node["resources"]["GPU"] == gpus(group)
        assert (node["min_workers"], node["max_workers"]) == (group["minReplicas"], group["maxReplicas"])


def test_opponents_scale_to_zero_and_the_learner_stays():
    for place in ("base", "overlays/small-gpu", "overlays/two-pools", "overlays/spot"):
        groups = groups_of(the("RayJob", place))
        assert groups["opponent"]["minReplicas"] == 0 and groups["learner"]["minReplicas"] == groups["learner"]["maxReplicas"]


def test_on_spot_nodes_run_opponents_only():
    groups = groups_of(the("RayJob", "overlays/spot"))
    terms = {name: spot_terms(group) for name, group in groups.items()}
    assert terms["head"] == terms["learner"]
    ((away,), any_of) = terms["head"], terms["opponent"]
    assert [(key, values) for key, operator, values in away if operator == "NotIn"] == [
        (key, values) for ((key, operator, values),) in any_of if operator == "In"
    ]
    assert len(away) == len(any_of) == 4


def spot_terms(group):
    required = group["template"]["spec"]["affinity"]["nodeAffinity"]["requiredDuringSchedulingIgnoredDuringExecution"]
    return [
        [(rule["key"], rule["operator"], rule["values"]) for rule in term["matchExpressions"]]
        for term in required["nodeSelectorTerms"]
    ]


def test_an_overlay_of_the_users_own_names_image_config_and_namespace(users_own):
    manifests = users_own(kustomization_of_the_page())
    assert {manifest["metadata"]["namespace"] for manifest in manifests.values()} == {"my-run"}
    assert manifests["ConfigMap"]["data"] == {"run.yaml": "run: {name: mine}\n"}
    assert manifests["ConfigMap"]["metadata"]["name"] == "tpaw-run"
    for pod in pods_of(manifests["RayJob"]).values():
        assert [one["image"] for one in pod["spec"]["containers"]] == ["registry.example/tpaw:1"]


@with_schema
@pytest.mark.parametrize("overlay", ["two-pools", "spot", "kueue"])
def test_a_claim_takes_the_place_of_the_store_in_every_overlay(overlay, users_own):
    job = users_own(f"resources: [../kuberay/overlays/{overlay}]\ncomponents: [../kuberay/components/claim]\n")["RayJob"]
    check(job, schema_of("RayJob"))
    for group in groups_of(job).values():
        assert [source["secretRef"]["name"] for source in container(group)["envFrom"]] == ["tpaw-hub", "tpaw-trackers"]
        assert container(group)["volumeMounts"][-1] == {"name": "storage", "mountPath": "/storage"}
        assert group["template"]["spec"]["volumes"][-1]["persistentVolumeClaim"] == {"claimName": "tpaw-storage"}


@pytest.fixture
def users_own(tmp_path):
    """What a kustomization of the user's own, beside ours, builds to."""
    shutil.copytree(KUBERAY, tmp_path / "kuberay")
    mine = tmp_path / "mine"
    mine.mkdir()
    (mine / "run.yaml").write_text("run: {name: mine}\n")

    def build(kustomization):
        (mine / "kustomization.yaml").write_text(kustomization)
        return {manifest["kind"]: manifest for manifest in kustomize(mine)}

    return build


def kustomization_of_the_page():
    """The example in docs/kuberay.md, with the path to our folder that this test has."""
    page = (HOUSE / "docs/kuberay.md").read_text(encoding="utf-8")
    (text,) = re.findall(r"```yaml\n(# mine/kustomization.yaml\n.*?)```", page, re.DOTALL)
    return text.replace("../tpaw_ray/cluster/kuberay", "../kuberay")


# Stops.


class Jobs:
    """Ray's job client with a job that is over, one that runs and ends at the third look, and a driver that is no job."""

    looks = 0
    stopped: tuple[str, ...] = ()

    def __init__(self, address):
        assert address == "http://127.0.0.1:8265"

    def list_jobs(self):
        return [SimpleNamespace(submission_id=name) for name in ("over", None, "running")]

    def get_job_status(self, job):
        Jobs.looks += job == "running"
        return SimpleNamespace(is_terminal=lambda: job == "over" or (Jobs.stopped == ("running",) and Jobs.looks > 3))

    def stop_job(self, job):
        Jobs.stopped += (job,)


def test_a_head_that_is_deleted_stops_what_runs_and_waits_for_its_end(monkeypatch):
    waits = []
    monkeypatch.setitem(sys.modules, "ray.job_submission", SimpleNamespace(JobSubmissionClient=Jobs))
    monkeypatch.setattr("time.sleep", waits.append)
    python, c, program = container(groups_of(the("RayJob", "base"))["head"])["lifecycle"]["preStop"]["exec"]["command"]
    assert (python, c) == ("python", "-c")
    exec(compile(program, "preStop", "exec"), {})
    assert Jobs.stopped == ("running",) and waits == [1, 1]


def test_the_job_client_has_what_the_deleted_head_asks_of_it():
    from ray.job_submission import JobDetails, JobStatus, JobSubmissionClient

    assert all(hasattr(JobSubmissionClient, name) for name in ("list_jobs", "stop_job", "get_job_status"))
    assert "submission_id" in JobDetails.model_fields
    assert JobStatus.STOPPED.is_terminal() and not JobStatus.RUNNING.is_terminal()


@everywhere
def test_pods_are_not_killed_before_a_stopped_run_may_have_ended(place):
    groups = groups_of(ray_manifest(place))
    stop = int(environment(container(groups["head"]))["RAY_JOB_STOP_WAIT_TIME_S"])
    drain = int(environment(container(groups["learner"]))["RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S"])
    rays_own = 30
    assert groups["head"]["template"]["spec"]["terminationGracePeriodSeconds"] >= stop + rays_own
    assert groups["learner"]["template"]["spec"]["terminationGracePeriodSeconds"] > drain >= stop
