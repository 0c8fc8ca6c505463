"""Peak TFLOP/s of accelerators, for the share of it that a training reaches (MFU).

peak_of("NVIDIA H100 80GB HBM3", "bf16")    # 989.0, TFLOP/s
"""

from __future__ import annotations

# Dense TFLOP/s with bf16 (V100: fp16) and with float32 (no TF32), from the data sheets. For an MI250X: one device, half
# of it. The first matching name is used.
PEAKS = {
    "GB200": (2500.0, 80.0),
    "B200": (2250.0, 75.0),
    "GH200": (989.0, 67.0),
    "H200 NVL": (835.0, 60.0),
    "H200": (989.0, 67.0),
    "H100 PCIe": (756.0, 51.0),
    "H100 NVL": (835.0, 60.0),
    "H100": (989.0, 67.0),
    "A100": (312.0, 19.5),
    "A40": (149.7, 37.4),
    "A30": (165.0, 10.3),
    "A10": (125.0, 31.2),
    "L40S": (362.0, 91.6),
    "L4": (121.0, 30.3),
    "V100": (125.0, 15.7),
    "MI300X": (1307.4, 163.4),
    "MI250X": (191.5, 23.9),
    "RTX 4090": (165.0, 82.6),
}


def peak_of(device: str, dtype: str) -> float | None:
    """Returns the dense TFLOP/s of an accelerator by its name, or None if the table lacks it.

    ``dtype`` is bf16 or fp16; any other value means float32.
    """
    found = next((peaks for name, peaks in PEAKS.items() if set(name.split()) <= set(device.split())), None)
    found = found or next((peaks for name, peaks in PEAKS.items() if f" {name}-" in f" {device}"), None)
    return None if found is None else found[0 if dtype in ("bf16", "fp16") else 1]
