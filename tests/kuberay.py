"""The manifests of cluster/kuberay as kustomize builds them, KubeRay's schema, and what its controller refuses beyond that."""

import re
import shutil
import subprocess
from copy import deepcopy
from functools import cache
from pathlib import Path

import pytest
import yaml
from jsonschema import Draft202012Validator, ValidationError, validators

HOUSE = Path(__file__).parents[1]
KUBERAY = HOUSE / "cluster/kuberay"
CRDS = HOUSE.parent / "shared/data/kuberay-crds"
"""Those of KubeRay 1.7.0."""
RESOURCES = ("num-cpus", "num-gpus", "memory", "resources")
DNS_LABEL = r"[a-z]([-a-z0-9]*[a-z0-9])?"
LABEL_VALUE = r"[A-Za-z0-9]([-A-Za-z0-9_.]{0,61}[A-Za-z0-9])?"
LABEL_KEY = rf"([a-z0-9]([-a-z0-9.]*[a-z0-9])?/)?{LABEL_VALUE}"


def kustomize(folder):
    """What `kubectl apply -k` would send, in its order."""
    for program in (["kustomize", "build"], ["kubectl", "kustomize"]):
        if shutil.which(program[0]):
            built = subprocess.run([*program, str(folder)], capture_output=True, text=True)
            assert built.returncode == 0, built.stderr
            return list(yaml.safe_load_all(built.stdout))
    pytest.skip("neither kustomize nor kubectl is installed")


@cache
def built(place):
    return kustomize(KUBERAY / place)


def the(kind, place):
    (found,) = [deepcopy(manifest) for manifest in built(place) if manifest["kind"] == kind]
    return found


def ray_manifest(place):
    return the("RayCluster" if place == "interactive" else "RayJob", place)


def cluster_of(manifest):
    return manifest["spec"].get("rayClusterSpec", {}) if manifest["kind"] == "RayJob" else manifest["spec"]


def groups_of(manifest):
    """The head and the worker groups, by name."""
    cluster = cluster_of(manifest)
    return {"head": cluster["headGroupSpec"]} | {group["groupName"]: group for group in cluster["workerGroupSpecs"]}


def pods_of(manifest):
    pods = {name: group["template"] for name, group in groups_of(manifest).items()}
    if manifest["kind"] == "RayJob":
        pods["submitter"] = manifest["spec"]["submitterPodTemplate"]
    return pods


def container(group):
    (only,) = group["template"]["spec"]["containers"]
    return only


def environment(container):
    return {variable["name"]: variable["value"] for variable in container.get("env", [])}


def gpus(group):
    return int(container(group)["resources"]["limits"]["nvidia.com/gpu"])


# The schema, as the API server applies it, but with unknown fields refused where it would drop them.


def unique_keys(validator, keys, items, schema):
    seen = [tuple(item.get(key) for key in keys) for item in items]
    if len(seen) != len(set(seen)):
        yield ValidationError(f"the same {keys} twice in {seen}")


Closed = validators.extend(Draft202012Validator, {"x-kubernetes-list-map-keys": unique_keys})


def closed(schema):
    if isinstance(schema, list):
        return [closed(part) for part in schema]
    if not isinstance(schema, dict):
        return schema
    schema = {key: closed(part) for key, part in schema.items()}
    if isinstance(schema.get("properties"), dict) and not schema.get("x-kubernetes-preserve-unknown-fields"):
        schema.setdefault("additionalProperties", False)
    return schema


@cache
def schema_of(kind):
    crd = yaml.load((CRDS / f"ray.io_{kind.lower()}s.yaml").read_text(), Loader=yaml.CSafeLoader)
    (schema,) = [version["schema"]["openAPIV3Schema"] for version in crd["spec"]["versions"] if version["name"] == "v1"]
    schema = closed(schema)
    schema["properties"]["metadata"] = {
        "additionalProperties": False,
        "properties": {key: {} for key in ("name", "labels", "annotations")},
    }
    return schema


def check(instance, schema):
    Closed(schema).validate(instance)


# What the controllers refuse though the schema takes it.


def complaints(manifest):
    """The rules of KubeRay 1.7's `validation.go` for what we use, those of Kueue's webhook for RayJobs, and two of our own."""
    name, spec, cluster = manifest["metadata"]["name"], manifest["spec"], cluster_of(manifest)
    if not re.fullmatch(DNS_LABEL, name) or len(name) > {"RayJob": 47, "RayCluster": 53}[manifest["kind"]]:
        yield f"name {name}"
    if manifest["kind"] == "RayJob":
        yield from complaints_of_job(spec)
        if "kueue.x-k8s.io/queue-name" in manifest["metadata"].get("labels", {}):
            if not spec.get("shutdownAfterJobFinishes"):
                yield "Kueue: shutdownAfterJobFinishes"
            if cluster.get("enableInTreeAutoscaling"):
                yield "Kueue: enableInTreeAutoscaling"
            if any(group["groupName"] == "head" for group in cluster["workerGroupSpecs"]):
                yield "Kueue: a group is called head"
    yield from complaints_of_cluster(cluster)


def complaints_of_job(spec):
    mode, shutdown = spec.get("submissionMode", "K8sJobMode"), spec.get("shutdownAfterJobFinishes")
    retries, ttl = spec.get("backoffLimit", 0), spec.get("ttlSecondsAfterFinished", 0)
    if spec.get("suspend") and (not shutdown or spec.get("clusterSelector")):
        yield "suspend"
    if ttl < 0 or (ttl and not shutdown):
        yield "ttlSecondsAfterFinished"
    if bool(spec.get("clusterSelector")) == bool(spec.get("rayClusterSpec")):
        yield "one of clusterSelector and rayClusterSpec"
    if retries < 0 or (retries and (mode == "InteractiveMode" or spec.get("clusterSelector"))):
        yield "backoffLimit"
    if mode == "SidecarMode" and ("submitterPodTemplate" in spec or "submitterConfig" in spec):
        yield "a submitter in SidecarMode"
    if spec.get("deletionStrategy", {}).get("deletionRules") and shutdown:
        yield "deletionRules"
    for deadline in ("activeDeadlineSeconds", "preRunningDeadlineSeconds"):
        if spec.get(deadline, 1) <= 0:
            yield deadline
    if spec.get("rayClusterSpec", {}).get("authOptions", {}).get("enableK8sTokenAuth"):
        yield "enableK8sTokenAuth"


def complaints_of_cluster(cluster):
    autoscaling, v2 = cluster.get("enableInTreeAutoscaling"), cluster.get("autoscalerOptions", {}).get("version") == "v2"
    version = tuple(map(int, cluster.get("rayVersion", "0").split(".")))
    if cluster.get("authOptions", {}).get("mode") == "token" and version < (2, 52):
        yield "authOptions: rayVersion"
    if "networkPolicy" in cluster or "tlsOptions" in cluster or "historyServerOptions" in cluster:
        yield "feature gates that are off by default"
    head, workers = cluster["headGroupSpec"], cluster["workerGroupSpecs"]
    if "RAY_enable_autoscaler_v2" in environment(container(head)):
        yield "RAY_enable_autoscaler_v2"
    for group in (head, *workers):
        parameters = group.get("rayStartParams", {})
        if group.get("resources") and any(key in parameters for key in RESOURCES):
            yield "resources twice"
        if "labels" in parameters:
            yield "labels in rayStartParams"
        for key, value in group.get("labels", {}).items():
            if not re.fullmatch(LABEL_KEY, key) or not re.fullmatch(f"({LABEL_VALUE})?", value):
                yield f"label {key}: {value}"
        if autoscaling and v2 and group["template"]["spec"].get("restartPolicy", "Never") != "Never":
            yield "restartPolicy"
    for group in workers:
        if not 0 <= group["minReplicas"] <= group["replicas"] <= group["maxReplicas"]:  # replicas: our own rule
            yield f"replicas of {group['groupName']}"
        if group.get("idleTimeoutSeconds", 0) < 0 or ("idleTimeoutSeconds" in group and not v2):
            yield "idleTimeoutSeconds"
        if group.get("priority") and (not v2 or version < (2, 56)):
            yield "priority"
        if group.get("suspend"):
            yield "a suspended group"
        if not autoscaling and group["minReplicas"] < group["maxReplicas"]:  # our own: nothing would scale it
            yield f"nothing scales {group['groupName']}"
