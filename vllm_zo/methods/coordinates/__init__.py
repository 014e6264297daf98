"""Which numbers of a weight a method trains, and how they become two factors."""

from vllm_zo.methods.coordinates.base import Coordinates
from vllm_zo.methods.coordinates.dense import Dense
from vllm_zo.methods.coordinates.left_factor import LeftFactor, Population
from vllm_zo.methods.coordinates.middle_factor import Core, Diagonal
from vllm_zo.methods.coordinates.two_factors import TwoFactors

__all__ = ["Coordinates", "Core", "Dense", "Diagonal", "LeftFactor", "Population", "TwoFactors"]
