-- Which of these messages nobody's open transaction is about to take back. Primary keys.
-- $1 ids
with published as (
    select o.id from shardmq.outbox o where o.id = any($1::bigint[]) for update skip locked
), due as (
    select d.id from shardmq.delayed d where d.id = any($1::bigint[]) for update skip locked
)
select id from published union all select id from due
