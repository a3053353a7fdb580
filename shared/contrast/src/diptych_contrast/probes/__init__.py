"""How much frozen embeddings know: neighbours, linear and ridge probes, retrieval."""

from diptych_contrast.probes.linear import (
    FewLabelProbe,
    LinearProbe,
    few_label_probe,
    linear_probe,
)
from diptych_contrast.probes.neighbours import NeighbourProbe, knn_probe
from diptych_contrast.probes.ranking import (
    Retrieval,
    RetrievalDirection,
    expected_rank,
    recall_at_k,
    retrieval,
)
from diptych_contrast.probes.ridge import RidgeProbe, ridge_probe

__all__ = [
    "FewLabelProbe",
    "LinearProbe",
    "NeighbourProbe",
    "Retrieval",
    "RetrievalDirection",
    "RidgeProbe",
    "expected_rank",
    "few_label_probe",
    "knn_probe",
    "linear_probe",
    "recall_at_k",
    "retrieval",
    "ridge_probe",
]
