"""Knowledge distillation: larger networks predict the augmented training images, and the student learns from them.

Teacher and student see the same crop of an image, with the same mixing ("consistent teaching", Beyer et al. 2022).
Symbols: N images of a micro-batch, K categories of the student, h and w sides of its training crops.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torchvision.transforms.v2 import functional

from batchcls.models.build import build_model
from batchcls.preprocessing import Preprocessing
from batchcls.training.augmentation import adapt_crop_size, crop_size, resize_filter
from batchcls.training.fast_layers import fuse_frozen_norms
from batchcls.training.recipe import Recipe
from batchcls.training.teacher_bundles import TeacherBundle
from batchcls.training.train_config import TrainingSettings


class TeacherEnsemble:
    """Trained networks whose probabilities are averaged. They are not changed, and their results have no gradient."""

    def __init__(
        self,
        teachers: Sequence[TeacherBundle],
        recipe: Recipe,
        preprocessing: Preprocessing,
        device: str = "cpu",
    ) -> None:
        """Build the networks.

        Args:
            teachers: their bundles.
            recipe: recipe with the temperature, and with the crops of the student.
            preprocessing: preprocessing of the student.
            device: device of the networks and of the images.

        Raises:
            InputError: the installed library does not have an architecture, or the weights do not fit.
        """
        self._networks = [_TeacherNetwork(teacher, recipe, preprocessing, device) for teacher in teachers]
        self._temperature = recipe.distillation_temperature

    @torch.no_grad()
    def log_probabilities(self, images: Tensor, epoch: int) -> Tensor:
        """Return the logarithms of the mean probabilities at the temperature of the recipe, float32 of shape (N, K).

        Probabilities are those of the categories of the student, whose sum is 1 for each teacher.

        Args:
            images: augmented and mixed images of shape (N, 3, h, w), normalized with the mean and the standard
                deviation of the student.
            epoch: epoch, counted from 0, which determines the size of the images for a teacher.
        """
        # A softmax over some of the logits equals the renormalized probabilities of their classes.
        each = [
            nn.functional.log_softmax(network.logits(images, epoch).float() / self._temperature, dim=1)
            for network in self._networks
        ]
        return torch.logsumexp(torch.stack(each), dim=0) - math.log(len(each))


class _TeacherNetwork:
    """The network of a teacher, with its own preprocessing and the classes of the student."""

    def __init__(
        self, teacher: TeacherBundle, recipe: Recipe, preprocessing: Preprocessing, device: str
    ) -> None:
        config = teacher.bundle.config
        model = build_model(teacher.bundle).requires_grad_(False).eval()
        self._recipe = adapt_crop_size(recipe, model, config)
        self._preprocessing = config.preprocessing
        fuse_frozen_norms(model, crop_size(self._recipe, 0, self._preprocessing))
        self._model = model.to(device).to(memory_format=torch.channels_last)
        self._classes = torch.tensor(teacher.classes, device=device)
        # (x * std + mean - own_mean) / own_std
        colors = zip(
            *(preprocessing.mean, preprocessing.std, config.preprocessing.mean, config.preprocessing.std),
            strict=True,
        )
        changes = [(std / own_std, (mean - own_mean) / own_std) for mean, std, own_mean, own_std in colors]
        self._factor, self._offset = torch.tensor(changes, device=device).T.reshape(2, 1, 3, 1, 1)

    def logits(self, images: Tensor, epoch: int) -> Tensor:
        """Return the logits of the categories of the student, of shape (N, K); see `TeacherEnsemble`."""
        size = crop_size(self._recipe, epoch, self._preprocessing)
        if images.shape[2:] != size:
            images = functional.resize(
                images, list(size), interpolation=resize_filter(self._preprocessing), antialias=True
            )
        logits: Tensor = self._model(images * self._factor + self._offset)
        return logits[:, self._classes]


def open_ensemble(
    teachers: Sequence[TeacherBundle], settings: TrainingSettings, device: str
) -> TeacherEnsemble | None:
    """Build the teachers of a training on a device; None without teachers."""
    if not teachers:
        return None
    return TeacherEnsemble(teachers, settings.recipe, settings.preprocessing, device)
