"""The YAML files that Hydra composes; a package only so that a wheel carries them."""
