"""Med-NCA, medical image segmentation with neural cellular automata, as MONAI components."""

from mednca_monai.inferers import EnsembleInferer, RandomPatchInferer, TiledInferer
from mednca_monai.network import MedNCA
from mednca_monai.reference import convert_reference_state_dict

__all__ = [
    "EnsembleInferer",
    "MedNCA",
    "RandomPatchInferer",
    "TiledInferer",
    "convert_reference_state_dict",
]
__version__ = "0.1.0"
