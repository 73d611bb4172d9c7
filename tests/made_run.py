"""A run's folder written by hand, without a model: what its stages would have committed, for tests of what reads it."""

from dataclasses import replace

from tests.tiny import SPECIAL
from tests.unit.test_schema_and_store import STEP
from tpaw_ray.algorithm.team import Rollout, team_at
from tpaw_ray.config import dump_config, resolve_config
from tpaw_ray.runs.metrics import MetricsLog
from tpaw_ray.runs.store import RunStore
from tpaw_ray.schema import Answer, Generation, Prompt, Score

END = "<|end|>"
STEPS = 4


class MadeRun:
    """Writes a run of two iterations stage by stage. Texts are one token a character, the special ones included.

    Log-probabilities tell where they come from: player 1 gives the second prompt's target `-1 - 0.01`, and what checkpoint 2 said
    in its own iteration `-1.2 - 0.01`.
    """

    def __init__(self, root, name="made", planned=2, texts=(), **sections):
        self.store = RunStore.open(str(root), name)
        base = {"run": {"name": name, "root": str(root)}, "model": {"path": "m"}, "data": {"path": "d"}, "iterations": planned}
        self.config = resolve_config(base, sections)
        self.characters = sorted(set("".join(texts)) | set("0123456789+=# abcdefghijklmnopqrstuvwxyz"))
        self.ids = {token: index for index, token in enumerate((*SPECIAL, *self.characters))}

    def tokens(self, text, end=True):
        return [self.ids[char] for char in text] + ([self.ids[END]] if end else [])

    def start(self, train, heldout):
        """Config, environment, prompts and the start's tokenizer; rows are (prompt, target, reference answer)."""
        self.train, self.heldout = train, heldout
        self.store.write_bytes(self.store.path("config.yaml"), dump_config(self.config).encode())
        self.store.write_json(
            self.store.path("environment.json"),
            {"packages": {"torch": "9.9"}, "python": "3.11.1", "cluster": {"memory": 2.0**31}, "commit": None, "seed": 42},
        )
        for split, rows in (("train", train), ("validation", heldout)):
            half = -(-len(rows) // 2)
            for shard, part in enumerate((rows[:half], rows[half:])):
                prompts = [self._prompt(split, shard * half + index, *row) for index, row in enumerate(part)]
                self.store.write_rows(self.store.shard(self.store.prompts(split), shard), prompts, Prompt)
        self.store.commit(self.store.path("prompts"), rows=len(train) + len(heldout), train=len(train), validation=len(heldout))
        self.store.write_bytes(f"{self.store.checkpoint(0)}/tokenizer.json", self._tokenizer().to_str().encode())
        self.store.commit(self.store.checkpoint(0))
        return self

    def evaluate(self, checkpoint, answers):
        """`answers` are (text, answer, correct), one a held-out prompt."""
        output = self.store.evaluation(checkpoint)
        rows = [
            Answer(
                prompt_id=f"validation{index}",
                generated_tokens=self.tokens(text),
                text=text,
                answer=answer,
                reference_answer=self.heldout[index][2],
                correct=correct,
            )
            for index, (text, answer, correct) in enumerate(answers)
        ]
        self.store.write_rows(self.store.shard(f"{output}/answers", 0), rows, Answer)
        self._score("validation", checkpoint, f"{output}/target_scores", -1.0 - checkpoint)
        judged = [correct for _, _, correct in answers if correct is not None]
        accuracy = sum(judged) / len(judged) if judged else None
        counts = {"sequences": 8, "tokens": 80, "seconds": 5.0, "waited": 2.0, "accuracy": accuracy, "judged": len(judged)}
        self.store.commit(output, **counts, target_logp=-3.0 + checkpoint)
        return self

    def iterate(self, iteration, said, finish="stop"):
        """`said` is a text a training prompt, by the iteration's own checkpoint."""
        self.say(iteration, said, finish)
        team = team_at(iteration, self.config.team.size)
        for player in team:
            if player == iteration:
                self._score("train", player, self.store.target_scores(player), -1.0)
            for spoke in team:
                place = self.store.rollout_scores(player, Rollout(spoke, spoke))
                if place.startswith(self.store.iteration(iteration)):
                    self._score("train", player, place, -1.0 - spoke / 10)
        self.store.commit(f"{self.store.iteration(iteration)}/scores", sequences=4, tokens=40, seconds=4.0, waited=1.0)
        steps = self.steps(iteration)
        MetricsLog(self.store).write_update(iteration, steps)
        MetricsLog(self.store).append(steps)
        self.store.commit(self.store.learner(iteration), sequences=8, tokens=80, seconds=6.0)
        return self

    def say(self, iteration, said, finish="stop"):
        rollout = Rollout(iteration, iteration)
        half = -(-len(said) // 2)
        for shard, part in enumerate((said[:half], said[half:])):
            rows = [
                Generation(
                    prompt_id=f"train{shard * half + index}",
                    iteration=iteration,
                    opponent=iteration,
                    generated_tokens=self.tokens(text, end=finish == "stop") if finish != "set_aside" else [],
                    finish_reason=finish,
                )
                for index, text in enumerate(part)
            ]
            self.store.write_rows(self.store.shard(self.store.rollout(rollout), shard), rows, Generation)
        self.store.commit(self.store.rollout(rollout), sequences=4, tokens=40, seconds=3.0)

    def steps(self, iteration):
        team = list(team_at(iteration, self.config.team.size))
        return [
            replace(
                STEP,
                iteration=iteration,
                epoch=step // 2,
                step=step,
                steps=STEPS,
                players=team,
                player_weights=[1 / len(team)] * len(team),
                target_reward=0.1 * (step + 1),
                grad_norm=1.0,
            )
            for step in range(STEPS)
        ]

    def _score(self, split, player, output, logp):
        for path in self.store.files(self.store.prompts(split)):
            prompts = self.store.read_rows(path, Prompt)
            scores = [Score(player=player, response_id=one.prompt_id, logp=logp - 0.01 * one.row) for one in prompts]
            self.store.write_rows(f"{output}/{path.rsplit('/', 1)[1]}", scores, Score)

    def _prompt(self, split, row, prompt, target, reference):
        return Prompt(
            prompt_id=f"{split}{row}",
            row=row,
            prompt_tokens=[self.ids["<|user|>"], *self.tokens(prompt), self.ids["<|assistant|>"]],
            target_tokens=self.tokens(target),
            reference_answer=reference,
        )

    def _tokenizer(self):
        from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers

        tokenizer = Tokenizer(models.WordLevel(self.ids, unk_token="<unk>"))
        tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
        tokenizer.decoder = decoders.Fuse()
        tokenizer.add_special_tokens(list(SPECIAL))
        return tokenizer


TRAIN = [("1+1=", "#### 2", "2"), ("2+2=", "#### 4", "4"), ("3+3=", "#### 6", "6")]
HELDOUT = [("5+1=", "#### 6", "6"), ("5+2=", "#### 7", "7"), ("5+3=", "#### 8", "8"), ("5+4=", "#### 9", "9")]


def right(*places):
    """Held-out answers of which those at `places` are correct."""
    return [
        (f"#### {reference}", reference, True) if index in places else ("#### 0", "0", False)
        for index, (_, _, reference) in enumerate(HELDOUT)
    ]


def finished_run(root, **sections):
    """A finished run: 1, 2, then 4 of 4 held-out answers are correct."""
    run = MadeRun(root, **sections).start(TRAIN, HELDOUT)
    run.evaluate(0, right(3))
    run.iterate(0, ["#### 2", "#### 5", "#### 5"]).evaluate(1, right(0, 3))
    return run.iterate(1, ["#### 2", "#### 4", "nothing"]).evaluate(2, right(0, 1, 2, 3))
