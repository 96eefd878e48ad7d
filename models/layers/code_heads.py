"""From decoder states to logits of codes.

Shape legend: N requests, L code levels, K_l codes of level l, D width.
"""

from torch import Tensor, nn

INIT_STD = 0.02  # nearly uniform predictions at the start


class CodeHeads(nn.Module):
    """A linear map per level, without bias.

    Not tied to the code embedding: tying helps where many items are rare, and codes are not.
    """

    def __init__(self, codebook_sizes: tuple[int, ...], width: int) -> None:
        super().__init__()
        self.levels = nn.ModuleList(nn.Linear(width, k, bias=False) for k in codebook_sizes)
        self.num_codes, self.width = sum(codebook_sizes), width
        for parameter in self.parameters():
            nn.init.normal_(parameter, std=INIT_STD)

    def forward(self, x: Tensor) -> list[Tensor]:
        """[N, L, D] → logits of every level, L tensors [N, K_l] float32."""
        return [self.level(level, state) for level, state in enumerate(x.unbind(1))]

    def level(self, level: int, x: Tensor) -> Tensor:
        """[..., D] → logits of one level, [..., K_l] float32."""
        logits: Tensor = self.levels[level](x)
        return logits.float()

    def flops(self) -> float:
        """Forward FLOPs per request."""
        return 2.0 * self.num_codes * self.width
