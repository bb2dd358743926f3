# The API without torch. Build from the repository's root:
#   docker build -f docker/api.Dockerfile -t nibble-api .
FROM python:3.12.12-slim-bookworm

RUN useradd --create-home --uid 10001 nibble && install -d -o nibble -g nibble /var/lib/nibble
WORKDIR /srv/nibble

# Dependencies in a layer of their own: a change of the code does not install them again.
COPY pyproject.toml constraints.txt README.md ./
RUN python -c "import tomllib; print('\n'.join(tomllib.load(open('pyproject.toml', 'rb'))['project']['dependencies']))" \
        > requirements.txt \
    && pip install --no-cache-dir -c constraints.txt -r requirements.txt \
    && rm requirements.txt
COPY app app
COPY workers/__init__.py workers/__init__.py
COPY kernels/__init__.py kernels/__init__.py
RUN pip install --no-cache-dir --no-deps .
COPY docker/entrypoint.sh /usr/local/bin/nibble-entrypoint

USER 10001
ENV NIBBLE_STATE_DIR=/var/lib/nibble NIBBLE_HOST=0.0.0.0 NIBBLE_PORT=8420 NIBBLE_PROBE_PORT=8421 PYTHONUNBUFFERED=1
VOLUME /var/lib/nibble
EXPOSE 8420 8421
HEALTHCHECK --interval=15s --timeout=12s --start-period=15s \
    CMD ["python", "-c", "import urllib.request; urllib.request.urlopen('http://127.0.0.1:8421/readyz', timeout=8)"]
ENTRYPOINT ["nibble-entrypoint"]
CMD ["api"]
