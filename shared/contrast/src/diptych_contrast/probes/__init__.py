"""How much frozen embeddings know: neighbours, linear and ridge probes, retrieval."""

from diptych_contrast.probes.linear import FewLabelProbe as FewLabelProbe
from diptych_contrast.probes.linear import LinearProbe as LinearProbe
from diptych_contrast.probes.linear import few_label_probe as few_label_probe
from diptych_contrast.probes.linear import linear_probe as linear_probe
from diptych_contrast.probes.neighbours import NeighbourProbe as NeighbourProbe
from diptych_contrast.probes.neighbours import knn_probe as knn_probe
from diptych_contrast.probes.ranking import Retrieval as Retrieval
from diptych_contrast.probes.ranking import RetrievalDirection as RetrievalDirection
from diptych_contrast.probes.ranking import expected_rank as expected_rank
from diptych_contrast.probes.ranking import recall_at_k as recall_at_k
from diptych_contrast.probes.ranking import retrieval as retrieval
from diptych_contrast.probes.ridge import RidgeProbe as RidgeProbe
from diptych_contrast.probes.ridge import ridge_probe as ridge_probe
