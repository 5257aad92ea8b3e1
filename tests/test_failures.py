"""Images that fail do not end the others, also where an ensemble segments them."""

import pytest
import torch
from monai.data import DataLoader, MetaTensor
from monai.inferers import SimpleInferer

from mednca_monai import EnsembleInferer
from mednca_monai.failures import FailedImagesError, FailSafeDataset, FailSafeEvaluator


def test_an_ensemble_segments_all_images_but_those_that_fail():
    def read(case):
        values = torch.full((1, 8, 8), case["value"])
        return {"image": MetaTensor(values, meta={"filename_or_obj": case["image"]})}

    def network(image, seed):
        return torch.cat([image, seed.view(-1, 1, 1, 1) + image.log()], 1)

    cases = [{"image": f"{value}.nii", "value": value} for value in (1.0, -1.0, 2.0)]
    found = []
    evaluator = FailSafeEvaluator(
        device="cpu",
        val_data_loader=DataLoader(FailSafeDataset(cases, read), batch_size=1),
        network=torch.nn.Identity(),
        inferer=lambda image, _: EnsembleInferer(SimpleInferer(), num_runs=2)(image, network),
        postprocessing=lambda output: found.append(output["pred"]["nqm"].item()) or output,
        decollate=False,
    )
    with pytest.raises(FailedImagesError, match=r"1 of 3 images failed.*\n.*-1\.0\.nii.*finite"):
        evaluator.run()
    assert len(found) == 2
