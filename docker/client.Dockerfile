# One node, with CUDA where the host has it (the pinned torch brings its CUDA libraries). Build from the root:
#   docker build -f docker/client.Dockerfile -t cg-fedllm-client .
#   docker run --gpus device=0 -v $PWD/node:/node cg-fedllm-client --server HOST:9092 --ca /node/ca.crt \
#     --key /node/node-0 --partition 0 --partitions 2 --memory /node/memory
FROM python:3.11-slim
RUN useradd --create-home --uid 10001 fed
WORKDIR /app
COPY pyproject.toml constraints.txt ./
# what the project needs, in a layer of its own: a change of its code does not fetch it again
RUN python -c "import tomllib; print(*tomllib.load(open('pyproject.toml', 'rb'))['project']['dependencies'], sep='\n')" \
      > needed.txt && pip install --no-cache-dir --constraint constraints.txt --requirement needed.txt
COPY . .
USER 10001
ENTRYPOINT ["python", "-m", "client"]
