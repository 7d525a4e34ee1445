# The SuperLink and the server app, on CPU. Build from the repository's root:
#   docker build -f docker/server.Dockerfile -t cg-fedllm-server .
# Keys are mounted, never copied in:
#   docker run -v $PWD/deploy:/deploy -p 9092:9092 cg-fedllm-server start --folder /deploy
FROM python:3.11-slim
RUN useradd --create-home --uid 10001 fed
WORKDIR /app
COPY pyproject.toml constraints.txt ./
# what the project needs, in a layer of its own: a change of its code does not fetch it again
RUN python -c "import tomllib; print(*tomllib.load(open('pyproject.toml', 'rb'))['project']['dependencies'], sep='\n')" \
      > needed.txt && pip install --no-cache-dir --constraint constraints.txt --requirement needed.txt
COPY . .
RUN mkdir /deploy && chown fed /deploy
USER 10001
EXPOSE 9092
ENTRYPOINT ["python", "-m", "server"]
CMD ["start", "--folder", "/deploy"]
