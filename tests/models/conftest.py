"""The models here are tiny: torch's threads cost them more than they bring, above all on a busy machine."""

import torch

torch.set_num_threads(1)
