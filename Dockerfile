# lpvit on a CPU. Build it and run the demo; the run folder is left in ./runs, which user 1000 must be able to write:
#
#   docker build -t lpvit .
#   docker run --rm -v "$PWD/runs:/home/lpvit/runs" lpvit
#   docker run --rm lpvit doctor
FROM python:3.12-slim

COPY . /src
RUN pip install --no-cache-dir '/src[all]' && rm -rf /src

RUN useradd --create-home --uid 1000 lpvit
USER lpvit
WORKDIR /home/lpvit

ENTRYPOINT ["lpvit"]
CMD ["run", "digits_vit"]
