"""MLflow: the server or store of `MLFLOW_TRACKING_URI`; without one, files in the run's `tracking/mlflow`."""

import os
import re
import time
from collections.abc import Sequence

from mlflow import MlflowClient
from mlflow.entities import Metric, Param
from mlflow.environment_variables import MLFLOW_ALLOW_FILE_STORE, MLFLOW_TRACKING_URI

from tpaw_ray.runs.continuation import leaves
from tpaw_ray.tracking.entries import CHECKPOINT_MARK, STEP_MARK, Entry, Reached, Subject

TAG = "tpaw.run"
"""The tag that holds the run's id, by which a later driver finds it."""
AT_ONCE = 1000
"""Metrics that MLflow takes in one request."""
PARAMS_AT_ONCE = 100
LONGEST_PARAM = 6000


class MLflow:
    """One request for as many whole entries as it takes: a server's database has all of them or none."""

    def __init__(self, subject: Subject) -> None:
        address = MLFLOW_TRACKING_URI.get()
        if not address:
            # mlflow-skinny has no database, and its files are the one store that needs neither that nor a server.
            address = f"file:{subject.folder / 'mlflow'}"
            os.environ.setdefault(MLFLOW_ALLOW_FILE_STORE.name, "true")
        self._client = MlflowClient(tracking_uri=address)
        experiment = self._client.get_experiment_by_name(subject.project)
        place = experiment.experiment_id if experiment else self._client.create_experiment(subject.project)
        found = self._client.search_runs([place], filter_string=f"tags.`{TAG}` = '{subject.id}'", max_results=1)
        if found:
            self._run = found[0].info.run_id
            self._client.update_run(self._run, status="RUNNING")
        else:
            self._run = self._client.create_run(place, tags={TAG: subject.id}, run_name=subject.name).info.run_id
            self._describe(subject)
        steps = self._client.get_metric_history(self._run, STEP_MARK)
        checkpoints = self._client.get_metric_history(self._run, CHECKPOINT_MARK)
        self.reached = Reached(
            steps=max((metric.step for metric in steps), default=0),
            checkpoint=max((int(metric.value) for metric in checkpoints), default=-1),
        )

    def _describe(self, subject: Subject) -> None:
        """The config and environment as parameters, which MLflow never changes: those of the run's first start."""
        params = [
            Param(re.sub(r"[^\w\-. /]", "_", key)[:250], str(value)[:LONGEST_PARAM])
            for key, value in leaves(subject.config).items()
        ]
        for start in range(0, len(params), PARAMS_AT_ONCE):
            self._client.log_batch(self._run, params=params[start : start + PARAMS_AT_ONCE])

    def log(self, entries: Sequence[Entry]) -> None:
        now = int(time.time() * 1000)
        whole = max(1, AT_ONCE // max(len(entry.values) for entry in entries))
        for start in range(0, len(entries), whole):
            metrics = [
                Metric(name, value, now, entry.step)
                for entry in entries[start : start + whole]
                for name, value in entry.values.items()
            ]
            self._client.log_batch(self._run, metrics=metrics)

    def close(self) -> None:
        self._client.set_terminated(self._run)
