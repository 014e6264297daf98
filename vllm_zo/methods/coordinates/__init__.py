"""What a method trains of a weight, and how that becomes an adapter."""

from vllm_zo.methods.coordinates.base import Block, Coordinates
from vllm_zo.methods.coordinates.core import Core, Diagonal
from vllm_zo.methods.coordinates.dense import Dense
from vllm_zo.methods.coordinates.left_factor import LeftFactor, Population
from vllm_zo.methods.coordinates.two_factors import TwoFactors

__all__ = ["Block", "Coordinates", "Core", "Dense", "Diagonal", "LeftFactor", "Population", "TwoFactors"]
