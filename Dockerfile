# One image for every command:  docker build -t headwater . && docker run --rm headwater --help
FROM python:3.12-slim-bookworm

# libgomp: PyTorch's and numba's threads. A user of its own; its home holds the compiled kernels and fetched streams.
RUN apt-get update \
    && apt-get install -y --no-install-recommends libgomp1 \
    && rm -rf /var/lib/apt/lists/* \
    && useradd --create-home --uid 10001 headwater \
    && install -d -o headwater -g headwater /var/lib/headwater /var/lib/headwater-keys

WORKDIR /opt/headwater

# The packages first: they change seldom and take minutes. PyTorch's own index has the build without CUDA.
COPY pyproject.toml constraints.txt LICENSE ./
RUN pip install --no-cache-dir --extra-index-url https://download.pytorch.org/whl/cpu \
        -c constraints.txt "$(grep '^torch==' constraints.txt)" \
    && python -c "import tomllib; print('\n'.join(tomllib.load(open('pyproject.toml', 'rb'))['project']['dependencies']))" \
        > requirements.txt \
    && pip install --no-cache-dir -c constraints.txt -r requirements.txt

COPY headwater ./headwater
COPY streams ./streams
COPY model ./model
COPY state ./state
COPY monitoring ./monitoring
RUN pip install --no-cache-dir --no-deps -e .

USER headwater
ENV HEADWATER_STATE_DIR=/var/lib/headwater \
    NUMBA_CACHE_DIR=/home/headwater/.cache/numba
RUN python -c 'from model import learner, ranker; learner.warm_up(); ranker.warm_up(learner.Learner().matrix)'
VOLUME /var/lib/headwater
EXPOSE 8080
ENTRYPOINT ["headwater"]
CMD ["worker"]
