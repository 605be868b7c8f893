"""Train the network on rendered discs for a few minutes and write `dit.safetensors`."""

from pathlib import Path

import torch

from diffsynth.core.loader.save import save_checkpoint
from diffsynth.sampling.noise import add_noise
from diffsynth_toy.config import ToyDiTConfig
from diffsynth_toy.dit import ToyDiT
from diffsynth_toy.units import encode_prompt

SIZE, BATCH, STEPS = 32, 64, 6000
FILE = Path(__file__).parent / "src" / "diffsynth_toy" / "dit.safetensors"
COLOURS = {
    "red": (0.9, 0.1, 0.1),
    "orange": (1.0, 0.5, 0.0),
    "yellow": (0.95, 0.85, 0.1),
    "green": (0.1, 0.7, 0.2),
    "blue": (0.1, 0.2, 0.9),
    "purple": (0.5, 0.1, 0.7),
    "black": (0.0, 0.0, 0.0),
    "": (0.7, 0.7, 0.7),
}


def discs(names):
    """Return white images `b 3 32 32` in [-1, 1], each with a disc near the middle."""
    axis = torch.arange(SIZE) + 0.5
    centres = SIZE / 2 + 5 * (2 * torch.rand(2, len(names), 1, 1) - 1)
    radii = 6 + 3 * torch.rand(len(names), 1, 1)
    distance = ((axis[:, None] - centres[0]) ** 2 + (axis[None, :] - centres[1]) ** 2).sqrt()
    inside = (radii - distance + 0.5).clamp(0, 1)[:, None]
    colours = torch.tensor([COLOURS[name] for name in names])[:, :, None, None]
    return 2 * (inside * colours + (1 - inside)) - 1


def main(file=FILE, steps=STEPS):
    """Train, and write the weights to `file`, by default in the package."""
    torch.manual_seed(0)
    config = ToyDiTConfig()
    net = ToyDiT(config)
    optimizer = torch.optim.AdamW(net.parameters(), lr=4e-3, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 4e-3, total_steps=steps, pct_start=0.05)
    words = list(COLOURS)
    for step in range(steps):
        names = [words[index] for index in torch.randint(len(words), (BATCH,))]
        clean, sigma = discs(names), torch.rand(BATCH)
        noisy = add_noise(clean, torch.randn_like(clean), sigma)
        loss = (net(noisy, sigma, encode_prompt(prompt=names, device=torch.device("cpu"))) - clean).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        if step % 500 == 499:
            print(f"step {step + 1}: {loss.item():.4f}")
    save_checkpoint(net, file, architecture="toy_dit", config=config, dtype=torch.bfloat16)


if __name__ == "__main__":
    main()
