-- Whether the session that answers was opened by this very process: a pooler's is not.
-- $1 what was set when connecting
select coalesce(pg_catalog.current_setting('shardmq.direct', true) operator(pg_catalog.=) $1, false)
