"""The embedded judge as a Ray Serve application; its configuration is `ray_embedded.yaml`.

    PYTHONPATH=launch/judge_pool serve run launch/judge_pool/ray_embedded.yaml

needs `ray[serve]` and `sl_jax[judge]`, and no accelerator framework. Every replica is a whole
`JudgeServer`, with its own limits and counters, so it does not matter which one answers.
"""

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field
from ray import serve
from starlette.applications import Starlette

from sl_jax.scoring import EmbeddedConfig, EmbeddedJudge
from sl_jax.scoring.keys import read_key
from sl_jax.scoring.server import JudgeServer


class Arguments(BaseModel):
    """`args` of the application, as the flags of `sl_jax.judge`.

    Attributes:
      mode: which embedded judge.
      threads: judgements at the same time, per replica.
      token_env: environment variable of the clients' bearer token, read on the replicas; "" for a
        judge that is open to whoever reaches the port.
    """

    model_config = ConfigDict(extra="forbid")

    mode: Literal["precise", "vlm"] = "precise"
    threads: int = Field(2, ge=1)
    token_env: str = "JUDGE_TOKEN"


def build(arguments: Arguments) -> serve.Application:
    """The application; Ray Serve calls this with `args` of its configuration.

    Raises:
      KeyMissingError: on a replica, where the environment holds no token.
    """

    def served() -> Starlette:  # runs on each replica
        judge = EmbeddedJudge(EmbeddedConfig(mode=arguments.mode))
        return JudgeServer(judge, read_key(arguments.token_env), threads=arguments.threads).app

    return serve.deployment(serve.ingress(served)(), name="judge").bind()
