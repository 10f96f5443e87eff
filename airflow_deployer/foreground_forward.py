"""`deployer port-forward`: hold the forward in this process, or end the one in the background."""

from __future__ import annotations

from airflow_deployer.config import Settings
from airflow_deployer.connection import connect
from airflow_deployer.progress import Progress


def forward_in_foreground(settings: Settings, progress: Progress) -> None:
    """Hold the forward in this process until Ctrl-C; an own one in the background is replaced by it."""
    import asyncio

    from airflow_deployer import background_forward, port_forward

    session = connect(settings)
    background_forward.stop(session.target)
    port = settings.port_forward.port

    async def hold() -> None:
        await port_forward.serve(
            session.target,
            port=port,
            on_ready=lambda local: progress.info(
                f"forwarding http://localhost:{local} to {session.target}; Ctrl-C ends it"
            ),
            stop=asyncio.Event(),
            log=progress.info,
        )

    asyncio.run(hold())


def stop_forward(settings: Settings) -> bool:
    """End the forward in the background; False when none was running."""
    from airflow_deployer import background_forward

    return background_forward.stop(connect(settings).target)
