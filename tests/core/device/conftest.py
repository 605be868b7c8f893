from fake_devices import bare, recorded

__all__ = ["bare", "recorded"]
