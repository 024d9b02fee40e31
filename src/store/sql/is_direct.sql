-- Whether the session that answers was opened by this very process: a pooler's is not.
-- $1 what was set when connecting
select coalesce(current_setting('shardmq.direct', true) = $1, false)
