# lpvit on a CPU. Build and run the demo; the run folder is left in ./runs:
#
#   docker build -t lpvit .
#   docker run --rm -v "$PWD/runs:/work/runs" lpvit
#   docker run --rm lpvit doctor
FROM python:3.12-slim

COPY . /src
RUN pip install --no-cache-dir '/src[all]' && rm -rf /src

RUN useradd --create-home lpvit && mkdir -p /work/runs && chown -R lpvit /work
USER lpvit
WORKDIR /work

ENTRYPOINT ["lpvit"]
CMD ["run", "digits_vit"]
