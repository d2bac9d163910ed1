"""The selective state space layer (S6) over several sequences at once: what Mamba's descendants share.

With u (B, G, N, C), one group per direction or head, and everything with a group axis learned per group:

    [d, B, C] = u W_x                          (B, G, N, R), (B, G, N, S), (B, G, N, S)
    dt = softplus(d W_dt + b),  A = -exp(A_log)
    y = selective_scan(u, dt, A, B, C, D)      (B, G, N, C)
"""

import math

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.functional import softplus

from foveate.core.dtypes import accumulation_dtype
from foveate.core.errors import bad
from foveate.kernels.scan.selective import Backend, selective_scan


class SelectiveSSM(nn.Module):
    """Projections, step sizes and scan of `groups` selective state spaces of `channels` channels each.

    Args:
        groups: G, how many sequences with parameters of their own there are.
        channels: C of each.
        states: S per channel.
        rank: R, width of the step sizes before they are spread over the channels; None for ceil(C / 16).
        backend: of `selective_scan`.
    """

    def __init__(
        self,
        *,
        groups: int,
        channels: int,
        states: int = 16,
        rank: int | None = None,
        backend: Backend = "auto",
    ):
        super().__init__()
        rank = math.ceil(channels / 16) if rank is None else rank
        for name, value in (("groups", groups), ("channels", channels), ("states", states), ("rank", rank)):
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise bad(name, value, "a positive integer")
        self.groups, self.channels, self.states, self.rank = groups, channels, states, rank
        self.backend: Backend = backend
        self.x_proj = nn.Parameter(torch.empty(groups, rank + 2 * states, channels))
        self.dt_proj = nn.Parameter(torch.empty(groups, channels, rank))
        self.dt_bias = nn.Parameter(torch.empty(groups, channels))
        self.A_log = nn.Parameter(torch.empty(groups, channels, states))
        self.D = nn.Parameter(torch.empty(groups, channels))
        self.reset_parameters()

    def reset_parameters(self, smallest: float = 1e-3, largest: float = 0.1) -> None:
        """Draw parameters as Mamba does: A = -1, ..., -S, step sizes log-uniform from `smallest` to `largest`."""
        with torch.no_grad():
            for weight in self.x_proj:
                nn.init.kaiming_uniform_(weight, a=math.sqrt(5))
            nn.init.uniform_(self.dt_proj, -(self.rank**-0.5), self.rank**-0.5)
            low, high = math.log(smallest), math.log(largest)
            dt = torch.exp(low + (high - low) * torch.rand_like(self.dt_bias))
            self.dt_bias.copy_(dt + torch.log(-torch.expm1(-dt)))  # the inverse of softplus
            self.A_log.copy_(torch.arange(1, self.states + 1).log().expand_as(self.A_log))
            nn.init.ones_(self.D)

    def forward(self, u: Float[Tensor, "b g n c"]) -> Float[Tensor, "b g n c"]:
        """Run every group over its sequence; computed and returned in float32 or wider.

        Raises:
            ArgumentError: naming `u`.
        """
        if u.ndim != 4 or u.shape[1] != self.groups or u.shape[3] != self.channels:
            raise bad("u", tuple(u.shape), f"(batch, {self.groups}, tokens, {self.channels})")
        dt, B, C = (u @ self.x_proj.mT).split([self.rank, self.states, self.states], dim=-1)
        wide = accumulation_dtype(u.dtype)
        dt = softplus((dt @ self.dt_proj.mT).to(wide) + self.dt_bias.to(wide).unsqueeze(1))
        A = -self.A_log.to(wide).exp()
        return selective_scan(
            u.to(wide), dt, A, B.to(wide), C.to(wide), D=self.D.to(wide), backend=self.backend
        )

    def extra_repr(self) -> str:
        """Show the options."""
        return f"groups={self.groups}, channels={self.channels}, states={self.states}, rank={self.rank}"
