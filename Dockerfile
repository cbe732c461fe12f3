# docker build -t icbhi-ast .
# docker run --gpus all -v /path/to/icbhi_dataset:/data -v "$PWD/runs:/app/runs" icbhi-ast \
#     python ast_film_train.py --config configs/ast_film_config.yaml dataset.data_folder=/data
#
# The image needs package registries alone while it is built; weights are fetched by the first run, or
# ahead (python -m models.pretrained --download DIR) and mounted.
FROM nvidia/cuda:12.8.1-base-ubuntu22.04

RUN apt-get update \
    && apt-get install --yes --no-install-recommends gcc libc6-dev python3 python3-dev python3-venv \
    && rm -rf /var/lib/apt/lists/*
RUN useradd --create-home --uid 1000 user && mkdir /app && chown user /app
USER user
WORKDIR /app
ENV PATH=/app/.venv/bin:$PATH PYTHONUNBUFFERED=1 DO_NOT_TRACK=true MLFLOW_DISABLE_TELEMETRY=true
# not constraints.txt, which is for Python 3.11; Ubuntu 22.04 has 3.10
COPY --chown=user requirements.txt .
RUN python3 -m venv .venv && pip install --no-cache-dir -r requirements.txt
COPY --chown=user . .
CMD ["python", "ast_film_train.py", "--help"]
