"""The from-scratch parts, written from their formulas; they import torch alone."""
