"""THE algorithm: team-based self-play, top to bottom.

Each stage reads what earlier ones committed, writes into a folder of its own and commits it; a stage whose marker stands
is skipped. So a run and its continuation are the same call.
"""

import time
from collections.abc import Callable
from dataclasses import asdict
from math import isfinite

from transformers import PreTrainedTokenizerBase

from tpaw_ray.algorithm.team import Rollout
from tpaw_ray.config import Config, at_iteration
from tpaw_ray.data.pairs import PairRecipe, pair
from tpaw_ray.data.prompts import prepare_prompts
from tpaw_ray.errors import DivergedError
from tpaw_ray.evaluation.exact_match import judge, verdict
from tpaw_ray.learner.group import Learner
from tpaw_ray.learner.mailbox import News
from tpaw_ray.opponents.messages import Sampling
from tpaw_ray.opponents.rollouts import Questions, adapter_of, generate
from tpaw_ray.opponents.roster import Roster
from tpaw_ray.plan import shards_asked
from tpaw_ray.policy.start import import_start
from tpaw_ray.runs.health import count_said
from tpaw_ray.runs.metrics import MetricsLog
from tpaw_ray.runs.progress import Reporter
from tpaw_ray.runs.store import RunStore
from tpaw_ray.runs.summary import Summary
from tpaw_ray.runs.teams import Teams
from tpaw_ray.schema import Answer, Generation, Prompt, Score
from tpaw_ray.scoring.pool import ScorerPool
from tpaw_ray.scoring.shards import ScoreShard, num_tokens, scores_of, shards_to_score, target_shards
from tpaw_ray.side_by_side import side_by_side
from tpaw_ray.tracking.follow import Trackers


class SelfPlay:
    """One run. Owns the actors; the state is on disk."""

    def __init__(
        self,
        config: Config,
        store: RunStore,
        tokenizer: PreTrainedTokenizerBase,
        roster: Roster,
        scorers: ScorerPool,
        start_learner: Callable[[], Learner],
        reporter: Reporter,
    ) -> None:
        self.config = config
        self.store = store
        self.tokenizer = tokenizer
        self.roster = roster
        self.scorers = scorers
        self.start_learner = start_learner
        self.reporter = reporter
        self.metrics = MetricsLog(store)
        self.summary = Summary(config, store)
        self.trackers = Trackers(config, store, reporter.say)
        self.teams = Teams(config, store)
        self.learner: Learner | None = None

    def run(self) -> None:
        """Play every iteration that is not committed yet; ends with checkpoint `iterations` evaluated."""
        first = self.first_open_iteration()
        if self.has_to_generate(first):
            self.host(first)  # its imports take as long as a small data set
        self.verify(first)
        self.prepare()
        if first < self.config.iterations and not self.store.is_committed(self.store.checkpoint(self.config.iterations)):
            self.learner = self.start_learner()  # takes as long to start as an opponent: both at once
        with self.trackers:
            self.evaluate(first)
            self.trackers.follow()
            for iteration in range(first, self.config.iterations):
                self.play(iteration)
        if self.learner:
            self.learner.close()

    def play(self, iteration: int) -> None:
        """One iteration of the paper: `θ_t` generates, the team scores, the live policy learns from the pairs."""
        # Scorers work on what is there, then on each shard of the new rollouts as it comes.
        side_by_side(lambda: self.generate(iteration), lambda: self.score(iteration), stop=self.dismiss)
        self.pair(iteration)
        # Opponents of the coming iteration that exist already speak while the learner trains.
        side_by_side(lambda: self.update(iteration), lambda: self.generate_ahead(iteration + 1), stop=self.dismiss)
        self.evaluate(iteration + 1)
        self.commit(iteration)

    # Stages, in the order in which they run.

    def prepare(self) -> None:
        """Render and tokenise the data once, and bring in `θ_0`."""
        counts = prepare_prompts(self.config, self.store, self.tokenizer)
        import_start(self.config.model, self.store, self.tokenizer)
        self.reporter.say(
            f"prompts: {counts.train} train, {counts.validation} validation, {counts.test} test of {counts.rows} rows "
            f"({counts.too_long} too long, {counts.duplicates} duplicates, {counts.leaked} also held out)"
        )

    def generate(self, iteration: int) -> None:
        """The opponents answer every training prompt, unless they did so in an earlier iteration."""
        rollouts = self.teams.rollouts(iteration)
        missing = [rollout for rollout in rollouts if not self.store.is_committed(self.store.rollout(rollout))]
        for rollout in missing:
            self.host(rollout.opponent)  # all at once
        for rollout in missing:
            self.speak(iteration, rollout)
        self.release(iteration)

    def generate_ahead(self, iteration: int) -> None:
        """Those opponents of an iteration to come speak whose checkpoint is there: with fresh rollouts, all but the newest."""
        if iteration == self.config.iterations or not self.config.run.overlap:
            return
        for rollout in self.teams.rollouts(iteration):
            if rollout.opponent < iteration and not self.store.is_committed(self.store.rollout(rollout)):
                self.host(rollout.opponent)
                self.speak(iteration, rollout)

    def speak(self, iteration: int, rollout: Rollout) -> None:
        """One opponent answers every training prompt."""
        output, engine = self.store.rollout(rollout), self.config.base_of(rollout.opponent)
        self.roster.wait_ready(engine)
        started = time.perf_counter()
        sampling = self.config.sampling
        total = self.num_prompts("train")
        self.expect(rollout.opponent)
        with self.reporter.stage(f"generate {rollout.opponent:03d}", total, iteration) as advance:
            generate(
                self.store,
                Questions(
                    split="train",
                    limit=None,
                    iteration=rollout.iteration,
                    opponent=rollout.opponent,
                    sampling=Sampling(
                        temperature=sampling.temperature, top_p=sampling.top_p, max_new_tokens=sampling.max_new_tokens
                    ),
                    run_seed=self.config.run.seed,
                    output=output,
                    adapter=adapter_of(self.store, self.config, rollout.opponent),
                ),
                self.roster.opponents(engine),
                advance,
                at_once=shards_asked(self.config),
            )
        seconds = time.perf_counter() - started
        prompts = self.store.files(self.store.prompts("train"))
        tokens = sum(self.store.num_tokens(path, Prompt, "prompt_tokens") for path in prompts)
        said = count_said(self.store.read_columns(path, Generation) for path in self.store.files(output))
        self.store.commit(
            output,
            sequences=total,
            tokens=tokens + said.tokens,
            seconds=seconds,
            generated=said.tokens,
            empty=said.empty,
            cut_off=said.cut_off,
            set_aside=" ".join(said.set_aside),
        )

    def score(self, iteration: int) -> None:
        """Every player scores the targets and the rollouts it has not scored in an earlier iteration, as they come."""
        output = f"{self.store.iteration(iteration)}/scores"
        if self.store.is_committed(output):
            return
        started = time.perf_counter()
        shards = shards_to_score(
            self.store, self.config, iteration, self.teams.players(iteration), self.teams.rollouts(iteration)
        )
        total = sum(shard.take for shard in shards)
        again = [shard for shard in shards if not shard.output.startswith(f"{output}/")]
        for scores in sorted({scores_of(shard) for shard in again}):
            if self.store.is_committed(scores):
                self.store.reopen(scores)  # should this driver die, the next one knows
        with self.reporter.stage("score", total, iteration) as advance:
            worked = self.scorers.score(shards, advance)
        seconds = time.perf_counter() - started
        self.commit_rescored(iteration, again)
        tokens = num_tokens(shards, self.store)
        self.store.commit(output, sequences=total, tokens=tokens, seconds=seconds, waited=seconds - worked)

    def pair(self, iteration: int) -> None:
        """Join prompts, rollouts and scores into triplets with the weights at the start of the update."""
        output = self.store.pairs(iteration)
        if self.store.is_committed(output):
            return
        started = time.perf_counter()
        rollouts = self.teams.rollouts(iteration)
        recipe = PairRecipe(
            iteration=iteration,
            players=self.teams.players(iteration),
            rollouts=rollouts,
            reward_scale=at_iteration(self.config.objective.reward_scale, iteration),
            eta=self.config.objective.eta,
            gamma=self.config.objective.gamma,
        )
        with self.reporter.stage("pair", self.num_prompts("train") * max(1, len(rollouts)), iteration) as advance:
            pairs = pair(self.store, recipe, advance)
        self.store.commit(output, pairs=pairs, seconds=time.perf_counter() - started)

    def update(self, iteration: int) -> None:
        """The learner makes `θ_{t+1}`. Its own record of the steps replaces what a killed driver may have missed."""
        if not self.config.run.overlap:
            self.scorers.close()  # opponents have been retired: nothing but the learner keeps a node
        if not self.store.is_committed(self.store.checkpoint(iteration + 1)):
            self.learn(iteration)
        self.metrics.settle(iteration)
        self.trackers.follow()
        self.store.remove(self.store.steps(iteration))
        for warning in self.summary.warnings(iteration):
            self.reporter.say(f"warning: iteration {iteration}: {warning}")

    def evaluate(self, checkpoint: int) -> None:
        """The checkpoint's opponent answers held-out prompts greedily, while a scorer scores their targets."""
        output = self.store.evaluation(checkpoint)
        if self.store.is_committed(output):
            return
        started = time.perf_counter()
        if not self.num_heldout():
            self.store.commit(output, sequences=0, tokens=0, seconds=0.0, waited=0.0, accuracy=None, target_logp=None)
            return
        (answers, answered_tokens, waited), (logps, scored_tokens) = side_by_side(
            lambda: self.answer(checkpoint), lambda: self.score_heldout(checkpoint), stop=self.dismiss
        )
        self.store.write_rows(self.store.shard(f"{output}/answers", 0), answers, Answer)
        found, target_logp = verdict(answers), sum(logps) / len(logps)
        if not isfinite(target_logp):  # of a last step whose loss still was
            raise DivergedError(f"checkpoint {checkpoint}: the log-probability of held-out targets is {target_logp}")
        self.store.commit(
            output,
            sequences=found.answers + len(logps),
            tokens=answered_tokens + scored_tokens,
            seconds=time.perf_counter() - started,
            waited=waited,
            accuracy=found.accuracy,
            judged=found.judged,
            target_logp=target_logp,
        )
        self.reporter.say(self.summary.line(checkpoint))

    def commit(self, iteration: int) -> None:
        """Write the summary and mark the iteration as done; the last, for after it nothing is looked at any more."""
        self.trackers.follow()
        self.summary.write()
        directory = self.store.iteration(iteration)
        if not self.store.is_committed(directory):
            row = self.summary.row(iteration + 1)
            self.store.write_json(f"{directory}/row.json", asdict(row))
            self.store.write_json(f"{directory}/committed.json", {"counts": row.sequences, "files": {}})

    # What stages need.

    def first_open_iteration(self) -> int:
        """The first iteration that is not committed, or whose checkpoint was removed although the team needs it."""
        iterations = self.config.iterations
        first = next((t for t in range(iterations) if not self.store.is_committed(self.store.iteration(t))), iterations)
        gone = [t for t in self.teams.players(first) if t and not self.store.is_committed(self.store.checkpoint(t))]
        return min(gone, default=first + 1) - 1

    def verify(self, iteration: int) -> None:
        """Compare with their checksums what earlier drivers made and all goes on from: the prompts and the team's checkpoints.

        Copies of checkpoints in an object store are compared when they are made.

        Raises:
            RunError: naming the first file that is not as it was committed.
        """
        needed = [self.store.path("prompts")]
        if not self.store.scheme:
            team = {iteration, iteration + 1, *self.teams.players(iteration)}  # fine-tuning has no players
            needed += map(self.store.checkpoint, sorted(team | {self.config.base_of(number) for number in team}))
        for directory in needed:
            if self.store.is_committed(directory):
                self.store.verify(directory)

    def host(self, checkpoint: int) -> None:
        """Start the checkpoint's opponents, once; they may start before their checkpoint is there, and wait for it.

        With adapters all checkpoints have the same opponents: those of the start model, which take any adapter.
        """
        engine = self.config.base_of(checkpoint)
        path = self.store.checkpoint(engine)
        self.roster.host(engine, path, f"{path}/committed.json")

    def expect(self, checkpoint: int) -> None:
        """Say how many prompts the checkpoint's opponents may leave unanswered, of all that they are asked."""
        asked = self.num_prompts("train") + self.num_heldout()
        self.roster.expect(self.config.base_of(checkpoint), int(self.config.opponents.max_set_aside * asked))

    def release(self, iteration: int) -> None:
        """Retire opponents that have nothing more to say, and warm up the coming checkpoint's."""
        coming = iteration + 1
        # An engine of adapters is there at once: on a GPU that it shares it would have the memory that the learner needs.
        overlap = self.config.run.overlap and not (self.config.adapters and 0 < self.config.opponents.gpus < 1)
        again = overlap and self.config.team.data == "fresh" and coming < self.config.iterations
        speaking = {rollout.opponent for rollout in self.teams.rollouts(coming)} if again else {coming}
        kept = {self.config.base_of(checkpoint) for checkpoint in speaking} if overlap else set()
        for engine in self.roster.hosted:
            if engine not in kept:
                self.roster.retire(engine)
        if overlap and (self.has_to_generate(coming) or self.has_to_be_evaluated(coming)):
            self.host(coming)

    def has_to_generate(self, checkpoint: int) -> bool:
        """Whether the checkpoint has yet to answer the prompts of the iteration that it starts."""
        own = Rollout(iteration=checkpoint, opponent=checkpoint)
        speaks = self.config.team.data in ("replay", "fresh") and checkpoint < self.config.iterations
        return speaks and not self.store.is_committed(self.store.rollout(own))

    def has_to_be_evaluated(self, checkpoint: int) -> bool:
        """Whether there are held-out prompts that the checkpoint has not answered."""
        return self.num_heldout() > 0 and not self.store.is_committed(self.store.evaluation(checkpoint))

    def commit_rescored(self, iteration: int, again: list[ScoreShard]) -> None:
        """Mark the scores of earlier iterations again, where they were stale or gone and have been made anew."""
        for earlier in range(iteration):
            scores = f"{self.store.iteration(earlier)}/scores"
            own = [shard for shard in again if scores_of(shard) == scores]
            if self.store.is_reopened(scores):
                self.store.commit(scores, **self.store.counts(scores))
            elif own and not self.store.is_committed(scores):
                made = sum(shard.take for shard in own)
                self.store.commit(scores, sequences=made, tokens=num_tokens(own, self.store), seconds=0.0, waited=0.0)

    def dismiss(self) -> None:
        """Break off the work of all actors: a stage beside theirs has failed, or the run is interrupted."""
        self.roster.retire_all()
        self.scorers.close()
        if self.learner:
            self.learner.break_off()

    def learn(self, iteration: int) -> None:
        """Order the update, and hand on its metrics as they come."""
        if self.learner is None:
            raise RuntimeError("no learner although an update is open")
        self.metrics.restart(iteration)
        pairs = self.store.counts(self.store.pairs(iteration))["pairs"]
        with self.reporter.stage("update", pairs * self.config.learner.epochs, iteration) as advance:
            taken = 0

            def on_news(news: News) -> None:
                nonlocal taken
                for remark in news.remarks:
                    self.reporter.say(remark)
                rows = [row for row in news.rows if row.step >= taken]  # others were taken again after a death
                taken += len(rows)
                self.metrics.append(rows)
                self.trackers.take(rows)
                advance(sum(row.triplets for row in rows))

            self.learner.update(iteration, on_news)
        if iteration == 0:
            attention = self.store.counts(self.store.learner(iteration))["attention"]
            self.reporter.say(f"learner: attention {attention}")

    def answer(self, checkpoint: int) -> tuple[list[Answer], int, float]:
        """Greedy answers to the held-out prompts, judged; the tokens they took; the seconds until the engine was ready."""
        output = f"{self.store.evaluation(checkpoint)}/generations"
        started = time.perf_counter()
        engine, evaluation = self.config.base_of(checkpoint), self.config.evaluation
        self.host(checkpoint)
        self.roster.wait_ready(engine)
        waited = time.perf_counter() - started
        self.expect(checkpoint)
        with self.reporter.stage(f"answer {checkpoint:03d}", self.num_heldout()) as advance:
            generate(
                self.store,
                Questions(
                    split=evaluation.split,
                    limit=evaluation.limit,
                    iteration=checkpoint,
                    opponent=checkpoint,
                    sampling=Sampling(
                        temperature=0.0,
                        top_p=1.0,
                        max_new_tokens=evaluation.max_new_tokens or self.config.sampling.max_new_tokens,
                    ),
                    run_seed=self.config.run.seed,
                    output=output,
                    adapter=adapter_of(self.store, self.config, checkpoint),
                ),
                self.roster.opponents(engine),
                advance,
                at_once=shards_asked(self.config),
            )
        prompts = [
            row for path in self.store.files(self.store.prompts(evaluation.split)) for row in self.store.read_rows(path, Prompt)
        ][: self.num_heldout()]
        said = [row for path in self.store.files(output) for row in self.store.read_rows(path, Generation)]
        unanswered = [row.prompt_id for row in said if row.finish_reason == "set_aside"]
        if unanswered:
            self.reporter.say(f"warning: held-out prompts that end every engine are not judged: {', '.join(unanswered)}")
        tokens = sum(len(row.prompt_tokens) for row in prompts) + sum(len(row.generated_tokens) for row in said)
        return judge(prompts, said, self.tokenizer, evaluation.answer_pattern), tokens, waited

    def score_heldout(self, checkpoint: int) -> tuple[list[float], int]:
        """Log-probabilities of the held-out targets under a checkpoint, and the tokens that took."""
        output, evaluation = f"{self.store.evaluation(checkpoint)}/target_scores", self.config.evaluation
        shards = target_shards(self.store, checkpoint, evaluation.split, output, evaluation.limit)
        with self.reporter.stage(f"score {checkpoint:03d}", self.num_heldout()) as advance:
            self.scorers.score(shards, advance)
        scores = [row for shard in shards for row in self.store.read_rows(shard.output, Score)]
        return [row.logp for row in scores], num_tokens(shards, self.store)

    def num_prompts(self, split: str) -> int:
        return int(self.store.counts(self.store.path("prompts"))[split])

    def num_heldout(self) -> int:
        """Held-out prompts that are answered."""
        return min(self.num_prompts(self.config.evaluation.split), self.config.evaluation.limit or 2**31)
