"""The names of methods, as reports and model cards give them."""

from tpaw_ray.config import PRESETS, Config

OWN_SETTINGS = "team-based self-play with settings of its own"


def method_of(config: Config) -> str:
    """The preset whose numbers a config has, where team and weights are made as presets make them."""
    if config.team.data == "none":
        return "fine-tuning on the targets"
    objective = config.objective
    if (config.team.select, objective.weights, objective.detach_weights) != ("last", "live", True):
        return OWN_SETTINGS
    kind = "given" if config.team.data == "given" else "replay"
    found = (kind, config.team.size, config.window, objective.eta, objective.gamma)
    dpo = "DPO on given preferences" if config.iterations == 1 else "iterated DPO on given preferences"
    named = {"tpaw": "TPAW", "spin": "SPIN", "dpo": dpo}
    for name, values in PRESETS.items():
        team, numbers = values["team"], values["objective"]
        if found == (team["data"], team["size"], team["window"] or team["size"], numbers["eta"], numbers["gamma"]):
            return named.get(name, f"TPAW {name.replace('-', ' ')}")
    return OWN_SETTINGS
