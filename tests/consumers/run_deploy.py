"""An application of the Deploy App SDK that segments an image by its bundle operator.

Run: python run_deploy.py bundle image.nii.gz segmentation.nii.gz. `bundle` is a folder or model.ts.
"""

import sys

import nibabel
import numpy as np
from monai.deploy.conditions import CountCondition
from monai.deploy.core import AppContext, Application, Image, IOType, Operator
from monai.deploy.operators.monai_bundle_inference_operator import (
    BundleConfigNames,
    IOMapping,
    MonaiBundleInferenceOperator,
)


class Source(Operator):
    """Gives an image as the SDK's DICOM reader does: axes reversed, places in the metadata."""

    def __init__(self, fragment, image):
        self.image = image
        super().__init__(fragment, CountCondition(fragment, 1))  # else it never ends

    def setup(self, spec):
        spec.output("image")

    def compute(self, op_input, op_output, context):
        sizes = self.image.header.get_zooms()[:3]
        names = ("row_pixel_spacing", "col_pixel_spacing", "depth_pixel_spacing")
        metadata = dict(zip(names, map(float, sizes), strict=True))
        metadata["nifti_affine_transform"] = self.image.affine
        volume = np.asarray(self.image.dataobj).astype(np.float32)
        op_output.emit(Image(np.swapaxes(volume, 0, 2), metadata), "image")


class Sink(Operator):
    """Saves the segmentation."""

    def __init__(self, fragment, image, path):
        self.image, self.path = image, path
        super().__init__(fragment)

    def setup(self, spec):
        spec.input("pred")

    def compute(self, op_input, op_output, context):
        found = np.swapaxes(op_input.receive("pred").asnumpy(), 0, 2)
        nibabel.save(nibabel.Nifti1Image(found, self.image.affine), self.path)


class App(Application):
    def __init__(self, bundle, image, path):
        self.arguments = bundle, nibabel.load(image), path
        super().__init__()

    def compose(self):
        bundle, image, path = self.arguments
        infer = MonaiBundleInferenceOperator(
            self,
            app_context=AppContext({}),
            input_mapping=[IOMapping("image", Image, IOType.IN_MEMORY)],
            output_mapping=[IOMapping("pred", Image, IOType.IN_MEMORY)],
            bundle_path=bundle,
            bundle_config_names=BundleConfigNames(config_names=["inference"]),
            name="infer",
        )
        self.add_flow(Source(self, image), infer, {("image", "image")})
        self.add_flow(infer, Sink(self, image, path), {("pred", "pred")})


if __name__ == "__main__":
    App(*sys.argv[1:]).run()
    print("{}", flush=True)
